"""preflight: the measurement really runs here, alone and with torch's collectives; the judgement of
what ranks left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from needed import needed

from hpctrain.base.paths import shipped_dir
from hpctrain.plan.load import load_plan
from hpctrain.runtime import history, nodecheck, preflight

SCRIPT = Path(shipped_dir("templates"), "base", "measure_nodes.py")


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
        [sys.executable, "-S", "-I", str(SCRIPT), "--out", str(out)],
        env=environ,
        check=True,
        timeout=60,
    )
    answer = preflight.judge(str(out), 1)
    assert answer["ok"] and answer["map"][0]["stage"] == "done"
    assert "collectives were not measured" in answer["remarks"][0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "rank-000000.json"]


def test_two_ranks_measure_each_other_with_torch(tmp_path):
    needed("torch")
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
            [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--mib", "1"],
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


def begin(job, restart, link=1, checkpoint=None):
    return {
        "event": "begin",
        "link": link,
        "job_id": job,
        "restart": restart,
        "mode": "scratch",
        "checkpoint": checkpoint,
    }


def put_back(job, restart, link=1):
    return {
        "event": "preflight",
        "link": link,
        "job_id": job,
        "restart": restart,
        "action": "requeue",
    }


RULES = nodecheck.Rules("exclude", 3, False, None, 2)
HOSTS = ["n0", "n1", "n2", "n3"]


def answer(bad=(), slow=(), ok=None, remarks=()):
    return {
        "ok": not bad if ok is None else ok,
        "bad": {node: ["x"] for node in bad},
        "slow": {node: ["x"] for node in slow},
        "remarks": list(remarks),
    }


@pytest.mark.parametrize(
    ("rules", "found", "requeued", "word", "nodes"),
    [
        ({}, answer(), 0, "go", []),
        ({}, answer(["n2"]), 0, "requeue", ["n2"]),
        ({}, answer(["n2"]), 2, "requeue", ["n2"]),
        ({}, answer(["n2"]), 3, "stop", ["n2"]),
        ({}, answer(["n0", "n1", "n2"]), 0, "stop", ["n0", "n1", "n2"]),  # not the nodes' fault
        ({}, answer(ok=False, remarks=["ranks that never started: 3"]), 0, "stop", []),
        ({}, answer(slow=["n1"]), 0, "go", []),
        ({"slow_is_bad": True}, answer(slow=["n1"]), 0, "requeue", ["n1"]),
        ({"policy": "stop"}, answer(["n2"]), 0, "stop", ["n2"]),
        ({"policy": "stop"}, answer(), 0, "go", []),
        ({"policy": "warn"}, answer(HOSTS), 0, "go", []),
    ],
)
def test_what_is_done_about_bad_nodes(rules, found, requeued, word, nodes):
    action = nodecheck.choose(RULES._replace(**rules), found, HOSTS, requeued)
    assert (action.word, action.nodes) == (word, nodes), action


def test_a_start_that_its_preflight_put_back_is_no_start_without_progress():
    links = [
        begin("7", 0),
        begin("8", 0, 2),
        put_back("8", 0, 2),
        begin("8", 1, 2),
        put_back("8", 1, 2),
    ]
    still = history.standstill(links, 3, None)
    assert (still.links, still.starts) == (1, 1)
    assert history.preflight_requeues(links, "8") == 2
    # It has no end to record; one that was let through has.
    assert history.open_attempt(links, "8", 1) is None
    links += [begin("8", 2, 2), {**put_back("8", 2, 2), "action": "go"}]
    assert history.open_attempt(links, "8", 2) == begin("8", 2, 2)


def test_ranks_that_never_started_are_laid_to_their_node():
    found = {"bad": {}, "map": [{"rank": rank} for rank in (0, 1, 4, 5)]}
    nodecheck._blame_missing(found, ["n0", "n1", "n2"], 6)
    assert found["bad"] == {"n1": ["rank 2 never started"]}


def spec(tmp_path, **changes):
    text = {
        "name": "x",
        "site": "local",
        "recipe": "command",
        "nodes": 1,
        "time": "2:00:00",
        "recipe_options": {"argv": ["true"]},
        **changes,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(text))
    return load_plan(str(tmp_path / "run.yaml"), ()).plan


def test_the_policy_is_decided_with_its_reason(tmp_path):
    assert spec(tmp_path).preflight is None
    assert spec(tmp_path, preflight=False).preflight is None
    assert spec(tmp_path, preflight=True).preflight["policy"] == "exclude"
    fixed = spec(tmp_path, preflight=True, sbatch={"no-requeue": True})
    assert fixed.preflight["policy"] == "warn" and "may not be requeued" in str(fixed.decisions)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"preflight": {"policy": "exclude"}, "sbatch": {"no-requeue": True}},
            "`no-requeue` forbids",
        ),
        ({"preflight": True, "time": "00:04:00"}, "does not fit"),
    ],
)
def test_a_preflight_that_cannot_be_is_an_error_of_the_plan(tmp_path, changes, words):
    assert any(words in problem.what for problem in spec(tmp_path, **changes).errors)


@pytest.mark.parametrize("value", ["yes please", 3, {"policy": "excude"}, {"limit": 3}])
def test_a_preflight_that_is_none_is_refused_with_its_place(tmp_path, value):
    found = spec(tmp_path, preflight=value).errors
    assert len(found) == 1 and "run.yaml:1" in found[0].where and "preflight" in found[0].what
