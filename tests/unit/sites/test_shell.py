"""`hpctrain shell`: the srun it becomes, for each site, and the limits it knows; what it would run
is run, with a fake srun."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.sites.shell import Wanted, allocation, read_request

sys.path.insert(0, str(Path(__file__).parents[2]))
from hostile import HOSTILE  # noqa: E402

LUMI = {"site": "lumi", "account": "project_465000001"}
# Runs what a real srun would run, and notes what it was asked and which Slurm variables leaked into
# it.
SRUN = """#!/usr/bin/env python3
import json, os, sys
words = sys.argv[1:]
at = words.index("bash")
leaked = sorted(name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) or name == "CUDA_VISIBLE_DEVICES")
json.dump({"options": words[:at], "leaked": leaked}, open(os.environ["NOTE"], "w"))
os.environ["SLURM_JOB_ID"] = "7"
os.execvp(words[at], words[at:])
"""


@pytest.fixture
def fake_srun(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("srun", SRUN),
        (
            "singularity",
            '#!/bin/bash\nwhile [ "$1" != "${1%.sif}.sif" ]; do shift; done; shift; exec "$@"\n',
        ),
        ("module", "#!/bin/sh\n"),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("NOTE", str(tmp_path / "note.json"))
    monkeypatch.chdir(tmp_path)
    # the folders made on the node are told by it
    monkeypatch.setenv("USER", f"hpctrain-test-{os.getpid()}")
    yield lambda: json.loads((tmp_path / "note.json").read_text())
    for folder in glob.glob(f"/tmp/hpctrain-test-{os.getpid()}-7-*"):
        os.rmdir(folder)


def argv(run_yaml=None, **wanted):
    wanted = Wanted(**wanted)
    site, spec = read_request(run_yaml, wanted)
    return list(allocation(site, spec, wanted).argv)


def test_lumi_gets_one_gpu_and_its_fair_share_on_the_debug_partition():
    words = argv(**LUMI, container="/scratch/c.sif")

    for word in (
        "--partition=dev-g",
        "--gpus-per-node=1",
        "--cpus-per-task=7",
        "--mem=60G",
        "--time=00:45:00",
        "--nodes=1",
        "--pty",
        "--account=project_465000001",
        "--hint=nomultithread",
    ):
        assert word in words
    at = words.index("singularity")
    assert words[at + 1] == "exec" and words[-4:] == [
        "-c",
        'eval "${WITH_CONDA:-:}"; exec "$@"',
        "activate",
        "bash",
    ]
    assert "/scratch/c.sif" in words and "--bind" in words


def test_a_whole_node_is_eight_gpus_on_lumi():
    words = argv(**LUMI, num_gpus=8)

    assert "--gpus-per-node=8" in words and "--cpus-per-task=56" in words and "--mem=480G" in words


def test_cpu_partitions_ask_for_no_gpu():
    words = argv(**LUMI, partition="debug", num_cpus=16)

    assert (
        not any("gpu" in word for word in words if word.startswith("--"))
        and "--mem=28G" in words
        and "--time=00:30:00" in words
    )


def test_the_run_gives_site_account_container_binds_and_environment(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        "name: r\nsite: lumi\nrecipe: command\ntime: 1h\naccount: project_465000002\ncontainer:"
        ' c/x.sif\ncontainer_binds: [/opt/mine]\nenv: {GREETING: "it\'s $HOME"}\nrecipe_options:'
        " {argv: [x]}\n"
    )
    words = argv(str(run))

    assert (
        "--account=project_465000002" in words
        and str(tmp_path / "c/x.sif") in words
        and "/opt/mine" in words
    )
    assert "export GREETING='it'\"'\"'s $HOME'" in words[words.index("-c") + 1]
    assert "--account=project_465000009" in argv(str(run), account="project_465000009")


@pytest.mark.parametrize(
    "wanted, words",
    [
        ({"site": "lumi"}, "needs an account"),
        ({**LUMI, "num_gpus": 9}, "--gpus 9 is more than"),
        ({**LUMI, "num_cpus": 57}, "--cpus 57 is more than"),
        ({**LUMI, "time": "4h"}, "longer than partition `dev-g` allows (03:00:00)"),
        ({**LUMI, "time": "soon"}, "--time: `soon` is not a duration"),
        ({**LUMI, "partition": "dev"}, "no partition `dev`"),
        ({"site": "local", "container": "x.sif"}, "runs no containers"),
        ({**LUMI, "container": "a,b.sif"}, "cannot hold"),
        ({}, "which site?"),
        ({"site": "lumy"}, "no site profile `lumy`"),
    ],
)
def test_what_cannot_be_is_refused_with_its_limit(wanted, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(words)):
        argv(**wanted)


def test_dry_run_prints_one_command_that_a_shell_reads_back(fake_srun, cli, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    code, out, _ = cli(
        "shell", "--site", "local", "--dry-run", "--", "echo", "it's `touch canary` $(touch canary)"
    )
    words = shlex.split(out)

    assert (
        code == 0
        and words[:3] == ["env", "--unset=SBATCH_ACCOUNT", "--unset=SLURM_JOB_ID"]
        and "--pty" not in words
    )
    assert words[-2:] == ["echo", "it's `touch canary` $(touch canary)"]
    done = subprocess.run(["bash", "-c", out], capture_output=True, text=True, check=False)
    assert done.stdout == "it's `touch canary` $(touch canary)\n" and not Path("canary").exists()


def test_nothing_of_an_enclosing_allocation_reaches_srun(fake_srun, hpctrain, monkeypatch):
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SLURM_NTASKS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "3")
    done = hpctrain("shell", "--site", "generic-cuda", "--", "true")

    assert done.returncode == 0, done.stderr
    assert fake_srun()["leaked"] == []


@pytest.mark.parametrize(
    "words", [HOSTILE[start : start + 24] for start in range(0, len(HOSTILE), 24)]
)
def test_the_words_of_a_command_arrive_as_they_are(words, fake_srun, hpctrain, tmp_path):
    words = [
        word
        for word in words
        if "\0" not in word and word.isprintable() or word in ("a\tb", "x\ntouch canary")
    ]
    show = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['MIOPEN_USER_DB_PATH']]))"
    )
    done = hpctrain(
        "shell",
        "--site",
        "lumi",
        "--account",
        "project_465000001",
        "--container",
        tmp_path / "it's $(touch canary).sif",
        "--",
        sys.executable,
        "-c",
        show,
        *words,
    )

    assert done.returncode == 0, done.stderr
    arrived, folder = json.loads(done.stdout)
    assert arrived == words and not (tmp_path / "canary").exists()
    assert os.path.isdir(folder) and folder.endswith("-7-miopen")


def test_the_exit_code_is_the_programs(fake_srun, hpctrain):
    assert hpctrain("shell", "--site", "local", "--", "bash", "-c", "exit 37").returncode == 37


def test_without_slurm_it_says_so(hpctrain, tmp_path):
    done = hpctrain(
        "shell",
        "--site",
        "local",
        "--",
        "true",
        env={**os.environ, "PATH": str(tmp_path)},
        cwd=tmp_path,
    )

    assert done.returncode == 3 and "there is no `srun` here" in done.stderr


def test_options_after_the_dashes_belong_to_the_command(fake_srun, hpctrain, tmp_path):
    done = hpctrain("shell", "--site", "local", "--", "echo", "--dry-run", "--", "--help")

    assert done.stdout == "--dry-run -- --help\n", done.stderr
