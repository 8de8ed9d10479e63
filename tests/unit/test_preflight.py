"""preflight: the measurement really runs here, alone and with torch's collectives; the judgement of what ranks left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.preflight import step as preflight

SCRIPT = Path(preflight.__file__)


def write(folder, rank, node, **facts):
    whole = {
        "rank": rank,
        "node": node,
        "stage": "done",
        "cpus": [rank],
        "scratch_mib_s": 100.0,
        "compute_s": 1.0,
        "ring_mib_s": 500.0,
        "comm": "x",
        **facts,
    }
    (folder / f"rank-{rank:06d}.json").write_text(json.dumps(whole))


def test_a_healthy_allocation_passes(tmp_path):
    for rank in range(8):
        write(tmp_path, rank, f"n{rank // 2}")
    answer = preflight.judge(str(tmp_path), 8)
    assert answer["ok"] and not answer["slow"] and not answer["remarks"]


def test_a_slow_node_is_named_with_how_slow(tmp_path):
    for rank in range(8):
        write(tmp_path, rank, f"n{rank // 2}", ring_mib_s=120.0 if rank // 2 == 3 else 500.0)
    answer = preflight.judge(str(tmp_path), 8)
    assert answer["slow"] == {"n3": ["ring at 24% of the others"]}
    assert answer["ok"]


def test_the_rank_that_is_furthest_behind_is_to_blame_not_those_that_wait_for_it(tmp_path):
    for rank in range(8):
        write(tmp_path, rank, f"n{rank // 2}", stage="disk" if rank == 5 else "compute")
    answer = preflight.judge(str(tmp_path), 8)
    assert answer["bad"] == {"n2": ["rank 5 never got past `compute`"]}


def test_missing_ranks_wrong_sums_clocks_gpus_and_shared_cores(tmp_path):
    write(tmp_path, 0, "n0", cpus=[0, 1])
    write(tmp_path, 1, "n0", cpus=[1, 2], allreduce_right=False)
    write(tmp_path, 2, "n1", clock_offset_s=-7.5, gpus=0)
    (tmp_path / "rank-000004.json").write_text("{")
    answer = preflight.judge(str(tmp_path), 4, gpus_per_task=1)
    assert not answer["ok"]
    assert answer["bad"] == {
        "n0": ["rank 1 got a wrong sum from an all-reduce"],
        "n1": ["rank 2 sees 0 GPUs, expected 1"],
    }
    assert answer["slow"] == {"n1": ["its clock is -7.5 s off"]}
    assert any("never started: 3" in remark for remark in answer["remarks"])
    assert any("share cores" in remark for remark in answer["remarks"])


def test_it_is_stdlib_only_and_leaves_nothing_but_its_notes(tmp_path):
    environ = {"PATH": "/usr/bin:/bin", "RANK": "0", "WORLD_SIZE": "1", "TMPDIR": str(tmp_path)}
    out = tmp_path / "out"
    # -S: no site packages, so neither torch nor mpi4py
    subprocess.run(
        [sys.executable, "-S", "-I", str(SCRIPT), "measure", "--out", str(out)], env=environ, check=True, timeout=60
    )
    judged = subprocess.run(
        [sys.executable, "-S", "-I", str(SCRIPT), "judge", "--out", str(out), "--ranks", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    answer = json.loads(judged.stdout)
    assert judged.returncode == 0 and answer["map"][0]["stage"] == "done"
    assert "collectives were not measured" in answer["remarks"][0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "rank-000000.json"]


def test_two_ranks_measure_each_other_with_torch(tmp_path):
    pytest.importorskip("torch")  # with tools/test it is there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "measure", "--out", str(tmp_path), "--mib", "1"],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=150) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    answer = preflight.judge(str(tmp_path), 2)
    assert answer["ok"], answer
    assert all(
        facts["ring_mib_s"] > 0 and facts["allreduce_right"] and abs(facts["clock_offset_s"]) < 1
        for facts in answer["map"]
    )
