"""`hpctrain shell` and `hpctrain site new` against a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpctrain.config.document import parse_yaml
from hpctrain.config.site import load_site, site_from_document

pytestmark = pytest.mark.slurm
HPCTRAIN = (sys.executable, "-m", "hpctrain")
ACCOUNT = ("--site", "lumi", "--account", "project_465000001")


def test_a_command_runs_in_an_allocation_of_the_debug_partition(sandbox, tmp_path):
    show = (
        'echo "$SLURM_JOB_PARTITION $SLURM_JOB_NUM_NODES $SLURM_CPUS_PER_TASK $SLURM_JOB_NAME'
        ' $NCCL_NET_GDR_LEVEL"; ls -d "$TRITON_CACHE_DIR"; exit 5'
    )
    done = sandbox.run(
        *HPCTRAIN, "shell", *ACCOUNT, "--time", "2", "--", "bash", "-c", show, cwd=tmp_path
    )

    assert done.returncode == 5, done.stderr
    first, folder = done.stdout.splitlines()
    assert first == "dev-g 1 7 hpctrain-shell PHB" and folder.endswith("-triton")


def test_hostile_words_and_a_leaking_shell_change_nothing(sandbox, tmp_path):
    words = ["it's", '"q"', "$(touch canary)", "`touch canary`", "a b", "", "-x", "é\n2", "%j", "#"]
    done = sandbox.run(
        *HPCTRAIN,
        "shell",
        *ACCOUNT,
        "--",
        "printf",
        "<%s>",
        *words,
        cwd=tmp_path,
        SBATCH_PARTITION="nosuch",
        SLURM_NTASKS="8",
        SRUN_CPUS_PER_TASK="3",
        SLURM_JOB_ID="99",
    )

    assert (done.returncode, done.stdout) == (0, "".join(f"<{word}>" for word in words)), (
        done.stderr
    )
    assert os.listdir(tmp_path) == []


def test_the_printed_command_is_the_one_that_runs(sandbox, tmp_path):
    line = sandbox.ok(
        *HPCTRAIN,
        "shell",
        *ACCOUNT,
        "--gpus",
        "2",
        "--dry-run",
        "--",
        "bash",
        "-c",
        "echo $SLURM_GPUS_ON_NODE $SLURM_CPUS_PER_TASK",
        cwd=tmp_path,
    )

    assert sandbox.ok("bash", "-c", line, cwd=tmp_path) == "2 14\n"


def test_a_terminal_gets_a_shell(sandbox, tmp_path):
    # `script` gives the terminal that srun --pty wants.
    hpctrain = " ".join([*HPCTRAIN, "shell", *ACCOUNT])
    done = subprocess.run(
        ["script", "-qec", hpctrain, "/dev/null"],
        cwd=tmp_path,
        env=sandbox.environ,
        input="echo on-$SLURM_JOB_PARTITION-$((40+2))\nexit 3\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert "on-dev-g-42" in done.stdout and done.returncode == 3, done.stdout + done.stderr


def test_a_profile_drafted_from_the_live_slurm_has_its_limits(sandbox, tmp_path):
    text = sandbox.ok(*HPCTRAIN, "site", "new", "drafted", "--dry-run", cwd=tmp_path)
    drafted, lumi = site_from_document(parse_yaml(text, "drafted")), load_site("lumi")

    assert set(drafted.partitions) <= set(lumi.partitions) and "dev-g" in drafted.partitions
    for name, partition in drafted.partitions.items():
        wanted = lumi.partitions[name]
        assert (partition.max_time_s, partition.node_type.gpus, partition.whole_nodes) == (
            wanted.max_time_s,
            wanted.node_type.gpus,
            wanted.whole_nodes,
        )
        assert partition.node_type.usable_cores == wanted.node_type.usable_cores
    assert (
        drafted.values["match"]["cluster_name"]
        and drafted.values["slurm"]["max_array_size"] >= 1001
    )
    sandbox.ok(*HPCTRAIN, "site", "new", "drafted", cwd=tmp_path)
    assert (
        sandbox.ok(*HPCTRAIN, "site", "check", "drafted", cwd=tmp_path, HPCTRAIN_NO_USER_CONFIG="0")
        == ""
    )
