"""The array on a real Slurm: tasks killed, a node lost, run again, and the same bytes as from one
process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenize_help import dialogues, model_path, oracle, write_jsonl  # noqa: E402

pytestmark = pytest.mark.slurm
ACCOUNT = "project_465000000"


def command(data, prefix, *more, kind="bpe_nmt_nfkc"):
    return [
        sys.executable,
        "-m",
        "hpctrain",
        "tokenize",
        str(data),
        "--tokenizer",
        model_path(kind),
        "--output-prefix",
        str(prefix),
        "--site",
        "lumi",
        "--account",
        ACCOUNT,
        *more,
    ]


def pair(prefix):
    return tuple(Path(f"{prefix}_text_document{end}").read_bytes() for end in (".bin", ".idx"))


def test_tasks_killed_and_a_node_lost_and_run_again_gives_the_same_bytes(sandbox, tmp_path):
    texts = dialogues(4000, seed=21)
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    prefix = tmp_path / "out"
    argv = command(
        data, prefix, "--tasks", "16", "--partition", "small-g", "--encoder", "sentencepiece"
    )
    rng = random.Random(5)
    first = subprocess.Popen(
        argv, env=sandbox.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed, where = [], ""
    deadline = time.monotonic() + 90
    while len(killed) < 3 and first.poll() is None and time.monotonic() < deadline:
        running = [
            line.split()
            for line in sandbox.ok("squeue", "-h", "-r", "-t", "R", "-o", "%i %N").splitlines()
        ]
        tasks = [(job, node) for job, node in running if "_" in job and job not in killed]
        if tasks:
            job, where = rng.choice(tasks)
            sandbox.run("scancel", "--signal=KILL", job)
            killed.append(job)
        time.sleep(0.5 * rng.random())
    node = where
    sandbox.ok("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    assert killed
    sandbox.ok("scontrol", "update", f"nodename={node}", "state=resume")
    # What the lost node ran is queued again by Slurm, after its pause for requeued jobs: do not
    # wait for it, start over.
    deadline = time.monotonic() + 60
    while first.poll() is None and time.monotonic() < deadline:
        states = sandbox.ok("squeue", "-h", "-r", "-o", "%T %i").split()
        if "RUNNING" not in states and "COMPLETING" not in states:
            sandbox.run("scancel", "-u", sandbox.ok("id", "-un").strip())
        time.sleep(0.5)
    stderr = first.communicate(timeout=60)[1]

    assert (
        first.returncode == 1
        and "shards are not done" in stderr
        and "run the same command again" in stderr
    ), stderr
    assert not list(tmp_path.glob("out_text*"))
    done = len(list((tmp_path / "out.tokenize").glob("*-[0-9]*.json")))
    again = sandbox.run(*argv, "--json", timeout_s=180)
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["status"] == "done" and answer["shards"] == 16
    assert (
        answer["shards_done_before"] <= done
        and answer["array_tasks"] <= 16 - answer["shards_done_before"]
    )
    assert pair(prefix) == oracle(texts, model_path("bpe_nmt_nfkc"))


def test_the_array_stays_within_the_sites_limits_and_goes_to_a_cpu_partition(sandbox, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", dialogues(50))
    done = sandbox.run(*command(data, tmp_path / "out", "--tasks", "500", "--dry-run", "--json"))

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (
        answer["status"] == "planned" and answer["shards"] == 500 and answer["array_tasks"] == 219
    )
    assert "220 submitted jobs" in done.stderr
    assert not list(tmp_path.glob("out*"))
    queued = sandbox.run(*command(data, tmp_path / "out", "--tasks", "2", "--no-wait"))
    assert queued.returncode == 8, queued.stderr
    assert set(sandbox.ok("squeue", "-h", "-r", "-o", "%P").split()) <= {"small"}
    twice = sandbox.run(*command(data, tmp_path / "out", "--tasks", "2"))
    assert twice.returncode in (0, 4)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out_text_document.idx").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert pair(tmp_path / "out") == oracle(dialogues(50), model_path("bpe_nmt_nfkc"))


def test_errors_in_the_data_come_before_anything_is_queued(sandbox, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [*dialogues(50), "no marker"])
    done = sandbox.run(*command(data, tmp_path / "out", "--tasks", "4"))

    assert done.returncode == 2 and "data.jsonl:51" in done.stderr
    assert not sandbox.ok("squeue", "-h").strip() and not list(tmp_path.glob("out*"))
    wrong = sandbox.run(
        *command(write_jsonl(data, dialogues(3)), tmp_path / "out")[:-1], "not_a_project"
    )
    assert wrong.returncode == 2 and "not an account of `lumi`" in wrong.stderr


def test_tasks_run_inside_the_sites_container(sandbox, tmp_path):
    """The sandbox's singularity performs the binds for real: what was not bound is not there."""
    texts = dialogues(60, seed=3)
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    image = tmp_path / "image.sif"
    image.write_text("an image")
    (tmp_path / "here").mkdir()
    profile = tmp_path / "here" / "profile.yaml"
    # this machine has no /pfs to bind
    profile.write_text("name: here\nextends: lumi\ncontainer: {binds: []}\n")
    done = sandbox.run(
        *command(
            data,
            tmp_path / "out",
            "--tasks",
            "2",
            "--container",
            str(image),
            "--site",
            str(profile),
        )
    )

    assert done.returncode == 0, done.stderr + "".join(
        path.read_text() for path in (tmp_path / "out.tokenize" / "logs").glob("*.out")
    )
    assert pair(tmp_path / "out") == oracle(texts, model_path("bpe_nmt_nfkc"))
    script = next((tmp_path / "out.tokenize" / "logs").glob("*.sh")).read_text()
    assert "singularity exec" in script and str(image) in script
