"""The only caller of Slurm: what it asks, in which environment, and how each way to fail is
told."""

from __future__ import annotations

import os

import pytest

from hpctrain.base.errors import EnvironmentFault
from hpctrain.slurm import commands as slurm

CALLS = {
    "sbatch": lambda: slurm.submit("x"),
    "scancel": lambda: slurm.cancel(["1"]),
    "scontrol": lambda: slurm.show("config"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_command_that_is_not_here_is_named_with_what_to_do(name, fake):
    with pytest.raises(EnvironmentFault, match=f"there is no `{name}` here") as caught:
        CALLS[name]()
    assert "hpctrain sandbox up" in caught.value.problems[0].hint
    assert not slurm.have(name)


def test_what_the_shell_holds_does_not_reach_the_job(fake, monkeypatch):
    for name in ("SLURM_JOB_ID", "SBATCH_TIMELIMIT", "SRUN_CPUS_PER_TASK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    fake.says("sbatch", "5\n")
    slurm.submit("job.sbatch")

    assert fake.asked[0]["leaks"] == ["SLURM_CONF"]
    leaking = set(slurm.leaking(os.environ))
    assert leaking == {
        "SLURM_JOB_ID",
        "SBATCH_TIMELIMIT",
        "SRUN_CPUS_PER_TASK",
        "PMI_RANK",
        "PMIX_RANK",
    }


@pytest.mark.parametrize("said", ["123\n", "123;cluster\n", "warning: x\n123\n"])
def test_a_submitted_job_is_told_by_its_id(fake, said):
    fake.says("sbatch", said)
    assert slurm.submit("dir/job.sbatch", ["2"], ["--hold"]) == "123"
    assert fake.asked[0]["argv"] == ["sbatch", "--parsable", "--hold", "dir/job.sbatch", "2"]


@pytest.mark.parametrize(
    ("out", "err", "code", "words"),
    [
        (
            "",
            "sbatch: error: Invalid account\nsbatch: error: again\n",
            1,
            "Invalid account; sbatch: error: again",
        )
    ],
)
def test_a_refused_job_is_told_in_slurms_words(fake, out, err, code, words):
    fake.says("sbatch", out, err, code)
    with pytest.raises(EnvironmentFault, match="Slurm refused the job") as caught:
        slurm.submit("job.sbatch")
    assert words in caught.value.problems[0].what and caught.value.problems[0].where == "job.sbatch"


def test_what_sbatch_would_do_is_asked_without_submitting(fake):
    fake.says("sbatch", "", "sbatch: Job 9 to start at 2026-11-21\n", 0)
    assert slurm.test_only("job.sbatch") == (True, "sbatch: Job 9 to start at 2026-11-21")
    fake.says("sbatch", "", "allocation failure\n", 1)
    assert slurm.test_only("job.sbatch") == (False, "allocation failure")
    assert fake.asked[0]["argv"] == ["sbatch", "--test-only", "job.sbatch"]


@pytest.mark.parametrize(
    ("err", "code", "fails"),
    [
        ("", 0, False),
        ("scancel: error: Kill job error on job id 1: Invalid job id specified\n", 1, False),
        ("scancel: error: Job 1 already completing\n", 1, False),
        ("scancel: error: Invalid job id 1\nscancel: error: Access/permission denied\n", 1, True),
        ("a remark\n", 0, False),
    ],
)
def test_only_what_keeps_a_job_alive_is_an_error_of_scancel(fake, err, code, fails):
    fake.says("scancel", "", err, code)
    if not fails:
        slurm.cancel(["1", "2"])
    else:
        with pytest.raises(EnvironmentFault, match="scancel failed") as caught:
            slurm.cancel(["1", "2"])
        assert "Invalid job id" not in caught.value.problems[0].what
    assert fake.asked[0]["argv"] == ["scancel", "1", "2"]


def test_nothing_to_cancel_asks_nothing(fake):
    slurm.cancel([])
    assert fake.asked == []


def test_a_signal_goes_to_the_batch_script_alone(fake):
    fake.says("scancel")
    slurm.signal_batch("7", "USR1")
    assert fake.asked[0]["argv"] == ["scancel", "--batch", "--signal=USR1", "7"]
    fake.says("scancel", "", "no such job", 1)
    with pytest.raises(EnvironmentFault, match="no such job"):
        slurm.signal_batch("7", "USR1")


@pytest.mark.parametrize(
    ("said", "excluded"),
    [
        ("JobId=7 ExcNodeList=nid[1-3,7] Foo=1", "nid[1-3,7]"),
        ("JobId=7 ReqNodeList=a ExcNodeList=(null) Foo=1", ""),
        ("JobId=7", ""),
        ("JobId=7 NoExcNodeList=x", ""),
    ],
)
def test_the_nodes_that_a_job_avoids(fake, said, excluded):
    fake.says("scontrol", said)
    assert slurm.excluded_nodes("7") == excluded
    assert fake.asked[0]["argv"] == ["scontrol", "show", "job", "-o", "7"]


def test_a_waiting_job_is_changed_and_a_refusal_is_told(fake):
    fake.says("scontrol")
    slurm.exclude_nodes("7", "nid[1-2]")
    assert slurm.set_dependency("7", "afterany:6") is True
    assert [one["argv"][1:] for one in fake.asked] == [
        ["update", "jobid=7", "ExcNodeList=nid[1-2]"],
        ["update", "jobid=7", "Dependency=afterany:6"],
    ]
    fake.says("scontrol", "", "Job is no longer pending", 1)
    assert slurm.set_dependency("7", "afterany:6") is False
    with pytest.raises(EnvironmentFault, match="job 7 failed: Job is no longer pending"):
        slurm.exclude_nodes("7", "nid1")


def test_scontrols_answer_or_why_there_is_none(fake):
    fake.says("scontrol", "ClusterName = lumi\n")
    assert slurm.show("config") == "ClusterName = lumi\n"
    assert slurm.cluster_name() == "lumi"
    fake.says("scontrol", "", "Unable to contact slurm controller", 1)
    assert slurm.cluster_name() is None
    fake.says("scontrol", "", "Node x not found", 1)
    with pytest.raises(EnvironmentFault, match="scontrol show node x` failed: Node x not found"):
        slurm.show("node", "x")


def test_no_cluster_name_without_scontrol(fake):
    assert slurm.cluster_name() is None


def test_a_slurm_that_does_not_answer_in_time_is_told(fake):
    (fake.folder / "scontrol").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (fake.folder / "scontrol").chmod(0o755)
    with pytest.raises(EnvironmentFault, match="did not answer within 0.3 s"):
        slurm.run(["scontrol", "show"], timeout_s=0.3)


def test_become_names_what_is_missing(fake):
    with pytest.raises(EnvironmentFault, match="there is no `srun` here"):
        slurm.become(["srun", "true"])
