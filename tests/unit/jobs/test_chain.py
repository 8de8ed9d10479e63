"""The arithmetic and the judgement of chains, without a Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace

import checkpoints
import pytest

from hpctrain.base.errors import Refused, UsageError
from hpctrain.base.units import expand_nodes
from hpctrain.jobs import bad_nodes, chain, side
from hpctrain.jobs.ledger import only_one, read_ledger
from hpctrain.runs.records import RunRecords, word_in_tags
from hpctrain.runs.starts import starts_of


def guard(top, **changes):
    return {
        "schema_version": 1,
        "run": "ft",
        "layout": "deepspeed",
        "checkpoint_dir": str(top / "ck"),
        "start": None,
        "target": 100,
        "give_up_after": 3,
        "counter": "latest",
        **changes,
    }


def plan(top, job=(), **changes):
    return {
        "run": "ft",
        "guard": guard(top, **changes),
        "job": {
            "num_links": 1,
            "time_s": 1000,
            "signal": {},
            "step_time_s": 10,
            "iterations": 100,
            "save_every": 20,
            "saves_on_signal": False,
            "account": None,
            **dict(job),
        },
        "cost": {
            "node_hours": 2.0,
            "gpu_hours": 16.0,
            "billed": 8.0,
            "unit": "GPU-hour",
            "formula": "",
        },
    }


def link(number, first, last, seconds, mode="resume"):
    times = [f"2026-01-01T00:{minute // 60:02d}:{minute % 60:02d}Z" for minute in (0, seconds)]
    key = {"link": number, "job_id": str(number), "restart": 0, "mode": mode}
    return [
        {
            "event": "begin",
            "iteration": first,
            "checkpoint": f"global_step{first}",
            "time": times[0],
            **key,
        },
        {"event": "end", "iteration": last, "time": times[1], "exit_code": 0, **key},
    ]


def test_the_step_time_is_measured_from_starts_that_ended(tmp_path):
    def measured(*records, **changes):
        guards = {"guard": guard(tmp_path, **changes)}
        return chain.measured_step_time_s(
            starts_of(RunRecords(str(tmp_path), "ft", guards, (), records))
        )

    assert measured() is None
    assert measured(*link(1, 100, 200, 500), *link(2, 200, 250, 100)) == pytest.approx(4)
    # A finetune counts from 0 upstream, and on from the start's number in the fork.
    assert measured(*link(1, 5000, 100, 200, "finetune")) == pytest.approx(2)
    fork = measured(*link(1, 5000, 5100, 200, "finetune"), counter="greatest_folder")
    assert fork == pytest.approx(2)
    assert measured(*link(1, 100, 100, 500)) is None
    assert measured(link(1, 100, 200, 500)[0]) is None


@pytest.mark.parametrize(
    ("done", "jobs", "links"),
    [
        (0, {}, 2),
        (0, {"save_every": 30}, 2),
        (0, {"time_s": 500}, 3),
        (60, {"time_s": 500}, 1),
        (0, {"time_s": 10_000}, 1),
    ],
)
def test_jobs_auto_counts_the_links_that_the_remaining_iterations_need(tmp_path, done, jobs, links):
    jobs = {"time_s": 800, **jobs}
    if done:
        checkpoints.save(str(tmp_path / "ck"), done, 1, 1)
    found = chain.plan_chain(str(tmp_path), plan(tmp_path, jobs), auto=True)
    assert len(found.new) == links
    assert found.gpu_hours == 16 * links and found.billed == 8 * links
    assert found.links[-1].last == 100


def test_jobs_auto_says_what_it_does_not_know_and_what_can_never_end(tmp_path):
    with pytest.raises(UsageError, match="step time"):
        chain.plan_chain(str(tmp_path), plan(tmp_path, {"step_time_s": None}), auto=True)
    with pytest.raises(UsageError, match="never|would reach a checkpoint"):
        chain.plan_chain(str(tmp_path), plan(tmp_path, {"time_s": 150}), auto=True)


def test_expectations_go_from_finetune_over_resume_to_done(tmp_path):
    start = checkpoints.save(str(tmp_path / "base"), 5000, 1, 1)
    found = chain.plan_chain(
        str(tmp_path), plan(tmp_path, {"time_s": 400}, start=start), num_links=4
    )
    assert [(e.mode, e.first, e.last) for e in found.links] == [
        ("finetune", 0, 40),
        ("resume", 40, 80),
        ("resume", 80, 100),
        ("done", None, None),
    ]
    fork = plan(tmp_path, {"time_s": 400}, start=start, counter="greatest_folder", target=5100)
    found = chain.plan_chain(str(tmp_path), fork, num_links=2)
    assert [(e.mode, e.first, e.last) for e in found.links] == [
        ("finetune", 0, 40),
        ("resume", 40, 80),
    ]


def test_links_that_ran_by_hand_keep_their_numbers(tmp_path, cluster):
    (tmp_path / "links.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in link(2, 0, 20, 100, "scratch"))
    )
    assert chain.plan_chain(str(tmp_path), plan(tmp_path), num_links=3).new == (3, 4, 5)


def test_a_stop_file_refuses_more_links(tmp_path):
    (tmp_path / "STOP").touch()
    with pytest.raises(Refused, match="STOP"):
        chain.plan_chain(str(tmp_path), plan(tmp_path), num_links=3)


def test_one_submitter_at_a_time_and_the_lock_goes_with_its_holder(tmp_path):
    with only_one(str(tmp_path)):
        with pytest.raises(Refused, match="another hpctrain"), only_one(str(tmp_path)):
            pass
    with only_one(str(tmp_path)):
        pass


def test_a_ledger_survives_torn_and_foreign_lines(tmp_path):
    lines = [
        '{"event": "submitting", "link": 1, "tag": "hpctrain:abc:1:link:x"}',
        "{tor",
        "[]",
        '{"event": "x"}',
        '{"event": "submitted", "link": 1, "job_id": "7"}',
        '{"event": "submitting", "link": 2}',
    ]
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines))
    ledger = read_ledger(str(tmp_path))
    assert ledger.submitted() == {(1, "link"): "7"}
    assert list(ledger.open()) == [(2, "link")]
    assert (word_in_tags(ledger.records), ledger.links()) == ("abc", {1, 2})


@pytest.mark.parametrize(
    ("log", "nodes", "blamed"),
    [
        ("srun: error: nid000003: task 5: Killed", "nid[000001-000008]", ["nid000003"]),
        (
            (
                "srun: error: nid000003: tasks 1-2: Bus error\nsrun: error: nid000004: task 9:"
                " Terminated"
            ),
            "nid[000001-000008]",
            ["nid000003"],
        ),
        (
            (
                "slurmstepd: error: *** JOB 7 ON nid000002 CANCELLED AT 2026-01-01T00:00:00 DUE TO"
                " NODE FAILURE ***"
            ),
            "nid[000001-000008]",
            ["nid000002"],
        ),
        ("srun: error: Node failure on nid000005", "nid[000001-000008]", ["nid000005"]),
        (
            "srun: error: nid[000001-000004]: tasks 0-3: Exited with exit code 1",
            "nid[000001-000008]",
            [],
        ),
        ("srun: error: nid000001: task 0: Killed", "nid[000001-000002]", []),
        ("srun: error: nid000001: task 0: Exited with exit code 1", "nid[000001-000008]", []),
        (
            "hpctrain: the first task to fail was rank 3 on nid000002, with exit code 137",
            "nid[000001-000008]",
            ["nid000002"],
        ),
        (
            "hpctrain: the first task to fail was rank 0 on nid000002, with exit code 1",
            "nid[000001-000008]",
            [],
        ),
        (
            "hpctrain: the first task to fail was rank 0 on nid000002, with exit code 143",
            "nid[000001-000008]",
            [],
        ),
        ("srun: error: nid000099: task 0: Killed", "nid[000001-000008]", []),
        ("srun: error: nid[1-: task 0: Killed", "nid[000001-000008]", []),
        ("", "", []),
    ],
)
def test_which_node_a_log_blames(log, nodes, blamed):
    assert bad_nodes.named(log, expand_nodes(nodes) if nodes else []) == blamed


EIGHT = [f"nid{number:06d}" for number in range(1, 9)]


@pytest.mark.parametrize("name", ["HUP", "INT", "USR1", "USR2", "TERM"])
def test_a_signal_that_somebody_sends_says_nothing_of_the_node(name):
    number = signal.Signals[f"SIG{name}"]
    first = (
        f"hpctrain: the first task to fail was rank 3 on nid000002, with exit code {128 + number}\n"
    )
    srun = f"srun: error: nid000002: task 3: {signal.strsignal(number)}\n"

    assert bad_nodes.named(first + srun, EIGHT) == []


@pytest.mark.parametrize("name", ["SEGV", "BUS", "ILL", "FPE", "ABRT", "KILL"])
def test_a_signal_that_a_node_can_cause_names_it(name):
    number = signal.Signals[f"SIG{name}"]
    first = (
        f"hpctrain: the first task to fail was rank 3 on nid000002, with exit code {128 + number}\n"
    )
    srun = f"srun: error: nid000003: task 3: {signal.strsignal(number)}\n"

    assert bad_nodes.named(first, EIGHT) == ["nid000002"]
    assert bad_nodes.named(srun, EIGHT) == ["nid000003"]


def test_a_node_is_bad_after_two_failures_and_a_requeue_is_one_of_its_own(tmp_path):
    (tmp_path / "logs").mkdir()
    line = "srun: error: nid000003: task 5: Killed\n"
    (tmp_path / "logs" / "ft-7.out").write_text(
        f"hpctrain: job 7, restart 0, 8 nodes\n{line}hpctrain: job 7, restart 1, 8"
        f" nodes\n{line}hpctrain: job 7, restart 2, 8 nodes\n"
    )
    begins = [
        {"event": "begin", "job_id": "7", "restart": restart, "nodes": "nid[000001-000008]"}
        for restart in range(3)
    ]
    run = RunRecords(
        str(tmp_path), "ft", links=tuple(begins), logs=(str(tmp_path / "logs" / "ft-7.out"),)
    )
    found = bad_nodes.find(run)
    assert [(node.name, node.failures) for node in found] == [("nid000003", ("7", "7.1"))]
    ended = {"event": "end", "job_id": "7", "restart": 1, "exit_code": 0}
    assert bad_nodes.find(replace(run, links=(*run.links, ended))) == []
    assert bad_nodes.merged("nid000001", found) == "nid[000001,000003]"


def test_a_side_job_has_the_scripts_directives_and_runs_it_only_after_a_checkpoint(
    tmp_path, monkeypatch
):
    script = tmp_path / "it's $(touch canary) bench.sh"
    script.write_text(
        '#!/bin/bash -e\n# a comment\n#SBATCH --time=5 # five\n\n#SBATCH -p small\necho "ran'
        ' $HPCTRAIN_CHECKPOINT"\n#SBATCH --late=1\n'
    )
    text = side.side_text(str(tmp_path / "run $(touch canary)"), 3, str(script))
    assert [line for line in text.split("\n") if line.startswith("#SBATCH")] == [
        "#SBATCH --time=5 # five",
        "#SBATCH -p small",
    ]
    fake = tmp_path / "bin"
    fake.mkdir()
    for code, expected in (
        (0, "ran /ck/global_step9\n"),
        (1, "hpctrain: link 3 made no new checkpoint: nothing to do after it\n"),
    ):
        (fake / "python3").write_text(f"#!/bin/sh\necho /ck/global_step9\nexit {code}\n")
        (fake / "python3").chmod(0o755)
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            env={"PATH": f"{fake}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert not os.path.exists(tmp_path / "canary")


@pytest.mark.parametrize("content", [None, "echo no shebang\n", b"\xff\xfe"])
def test_a_side_script_that_is_none_is_refused(tmp_path, content):
    script = tmp_path / "bench"
    if content is not None:
        script.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match="bench"):
        side.side_text(str(tmp_path), 1, str(script))
