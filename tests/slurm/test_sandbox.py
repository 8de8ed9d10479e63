"""Sandboxes, on the real Slurm that they are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.base import errors
from hpctrain.sandbox import nodeview, processes, state
from hpctrain.sandbox import sandbox as sandboxes

from .conftest import ACCOUNT, Sandbox, lumi, started

pytestmark = pytest.mark.slurm


def cli(*argv: str, home: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "XDG_STATE_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", "sandbox", *argv],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def left_over(directory: Path) -> list[processes.Process]:
    return processes.of_sandbox(str(directory), str(state.run_dir(directory, os.environ)))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A state home whose `default` sandbox is ended afterwards."""
    yield tmp_path
    sandboxes.down(
        "default", state.state_dir("default", "", {"XDG_STATE_HOME": str(tmp_path)}), os.environ
    )


def test_up_again_is_a_no_op_another_shape_is_refused_and_down_leaves_nothing(home: Path) -> None:
    arguments = ("--nodes", "1", "--nodes", "lumi-c=0", "--nodes", "lumi-d=0")
    first = cli("up", *arguments, home=home)
    assert first.returncode == 0, first.stderr
    again = cli("up", *arguments, "--json", home=home)
    assert again.returncode == 0 and "already running" in again.stderr
    answer = json.loads(again.stdout)
    assert answer["started"] is False and answer["nodes"] == {"nid000001": "idle"}
    other = cli("up", "--nodes", "2", home=home)
    assert other.returncode == errors.REFUSED and "another shape" in other.stderr
    status = cli("status", home=home)
    assert status.returncode == 0 and "1 idle" in status.stdout
    shell = cli("shell", "--", "bash", "-c", "sinfo -h -o %D -p dev-g; exit 7", home=home)
    assert (shell.stdout.strip(), shell.returncode) == ("1", 7)
    directory = Path(answer["directory"])
    assert left_over(directory)
    assert cli("down", home=home).returncode == 0
    assert not left_over(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["lock"]
    assert cli("status", home=home).returncode == errors.NO
    assert "not running" in cli("down", home=home).stderr


def test_two_sandboxes_run_side_by_side(sandbox: Sandbox, tmp_path: Path) -> None:
    with started(lumi(1), "other", tmp_path / "other") as other:
        assert other.ok("sinfo", "-h", "-p", "dev-g", "-o", "%D").strip() == "1"
        assert sandbox.ok("sinfo", "-h", "-p", "dev-g", "-o", "%D").strip() == "4"
        assert other.job(tmp_path, "srun hostname\n").split() == ["nid000001"]
    assert sandbox.job(tmp_path, "srun hostname\n").split() == ["nid000001"]


def test_a_job_of_two_nodes_and_eight_tasks_each_sees_its_nodes_and_gpus(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    script = """
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    srun bash -c 'echo task $SLURM_PROCID $SLURM_LOCALID $(hostname) $SLURMD_NODENAME $ROCR_VISIBLE_DEVICES'
    """
    options = (
        "-p standard-g -N2 --ntasks-per-node=8 --cpus-per-task=7 --gpus-per-node=8 --mem=480G"
        " --hint=nomultithread"
    )
    lines = [
        line.split()[1:]
        for line in sandbox.job(tmp_path, script, *options.split()).splitlines()
        if "task" in line
    ]
    assert sorted(int(line[0]) for line in lines) == list(range(16))
    assert sorted((line[2], int(line[1])) for line in lines) == [
        (n, i) for n in ("nid000001", "nid000002") for i in range(8)
    ]
    assert all(line[2] == line[3] and line[4] == "0,1,2,3,4,5,6,7" for line in lines)


@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_commands_and_node_names_are_there_however_the_job_was_submitted(
    sandbox: Sandbox, tmp_path: Path, export: str
) -> None:
    python = (
        'import socket; print("at", socket.gethostname(), socket.getaddrinfo("nid000001",'
        " 80)[0][4][0])"
    )
    script = f"""
    command -v srun singularity module
    module purge && module load something && echo module ok
    srun -N2 -n2 --export={export} /usr/bin/env python3 -c '{python}'
    env | grep -c LD_LIBRARY_PATH
    """
    text = sandbox.job(tmp_path, script + "true\n", "-N2", f"--export={export}", LD_LIBRARY_PATH="")
    bin_dir = str(sandbox.directory / "bin")
    assert text.split()[:3] == [f"{bin_dir}/{name}" for name in ("srun", "singularity", "module")]
    assert "module ok" in text
    address = text.split("at nid000001 ")[1].split()[0]
    assert address.startswith("127.77.") and f"at nid000002 {address}" in text


def test_without_namespaces_names_resolve_through_nss_wrapper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodeview, "unavailable", lambda box: "user namespaces are forbidden here")
    python = 'import socket; print("at", socket.gethostname(), socket.gethostbyname("nid000002"))'
    for limit in (40, 1):  # the whole table, and the short one of large sandboxes
        monkeypatch.setattr(nodeview, "NSS_WRAPPER_NODES", limit)
        with started(lumi(3), "nss", tmp_path / "nss") as box:
            text = box.job(
                tmp_path, f"srun -n2 python3 -c '{python}'\n", "-w", "nid[000002-000003]", "-N2"
            )
            assert sorted(text.split("\n")[:2]) == [
                "at nid000002 127.77.0.2",
                "at nid000003 127.77.0.2",
            ]
            (tmp_path / "x.sif").touch()
            refused = box.run(
                f"{box.directory}/bin/singularity", "exec", str(tmp_path / "x.sif"), "true"
            )
            assert (
                refused.returncode == 255 and "user namespaces are forbidden here" in refused.stderr
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-p standard-g -t 80:00:00", "Requested time limit is invalid"),
        ("-p small-g -N 5", "Node count specification invalid"),
        ("-p standard-g --array=0-1001", "Invalid job array specification"),
        (
            "-p standard-g --ntasks-per-node=8 --cpus-per-task=8",
            "Requested node configuration is not available",
        ),
        ("-p standard-g --ntasks-per-node=64", "Requested node configuration is not available"),
        ("-p standard-g --mem=481G", "Requested node configuration is not available"),
        ("-p standard-g --gpus-per-node=9", "Requested node configuration is not available"),
        ("-p standard-g --gpus-per-node=a100:8", "Requested node configuration is not available"),
        ("-p nonesuch", "invalid partition specified"),
    ],
)
def test_what_the_site_would_refuse_is_refused_with_slurms_own_message(
    sandbox: Sandbox, options: str, message: str
) -> None:
    result = sandbox.run("sbatch", "-o", "/dev/null", *options.split(), "--wrap", "true")
    assert result.returncode != 0 and message in result.stderr


def test_what_the_site_would_accept_is_accepted(sandbox: Sandbox) -> None:
    for options in (
        (
            "-p standard-g -N 4 --ntasks-per-node=8 --cpus-per-task=7 --gpus-per-node=mi250:8"
            " --mem=480G -t 2-0"
        ),
        "-p standard-g --ntasks-per-node=8 --cpus-per-task=14 --hint=multithread",
        "-p standard-g --exclusive=user --hint=nomultithread",
        "-p small --array=0-999",
    ):
        sandbox.ok("sbatch", "-H", "-o", "/dev/null", *options.split(), "--wrap", "true")


def test_submit_limits_and_accounts_are_enforced_at_submission(
    accounting_sandbox: Sandbox, tmp_path: Path
) -> None:
    box = accounting_sandbox

    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        return box.run("sbatch", "-t", "1", "-o", "/dev/null", *options, "--wrap", "sleep 60")

    account = ("-A", ACCOUNT)
    assert [submit("-p", "dev-g", *account).returncode for _ in range(2)] == [0, 0]
    third = submit("-p", "dev-g", *account)
    assert third.returncode != 0 and "QOSMaxSubmitJobPerUserLimit" in third.stderr
    box.wait_for(lambda: "RUNNING" in box.ok("squeue", "-h", "-o", "%T"))
    assert sorted(box.ok("squeue", "-h", "-p", "dev-g", "-o", "%T").split()) == [
        "PENDING",
        "RUNNING",
    ]
    wrong = submit("-p", "standard-g", "-A", "project_999999999")
    assert wrong.returncode != 0 and "Invalid account" in wrong.stderr
    none = submit("-p", "standard-g")
    assert none.returncode != 0 and "AssocMaxSubmitJobLimit" in none.stderr
    array = submit("-p", "small", *account, "--array=0-220")
    assert array.returncode != 0 and "QOSMaxSubmitJobPerUserLimit" in array.stderr


def test_sacct_knows_the_jobs(accounting_sandbox: Sandbox, tmp_path: Path) -> None:
    box = accounting_sandbox
    result = box.run(
        "sbatch",
        "--parsable",
        "--wait",
        "-t",
        "1",
        "-A",
        ACCOUNT,
        "-o",
        "/dev/null",
        "--wrap",
        "exit 3",
    )
    assert result.returncode == 3
    job = result.stdout.strip()
    box.wait_for(
        lambda: "FAILED|3:0" in box.ok("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")
    )


@pytest.mark.parametrize("action", ["--down", "--crash"])
def test_a_node_fault_requeues_the_job_under_the_same_id(tmp_path: Path, action: str) -> None:
    with started(lumi(3, slurmd_timeout_s=5), "fault", tmp_path / "fault") as box:
        script = tmp_path / "job.sh"
        script.write_text(
            f"#!/bin/bash\necho start $SLURM_RESTART_COUNT $(hostname) $$ >>{tmp_path}/log\nsleep"
            " 300\n"
        )
        job = box.ok(
            "sbatch",
            "--parsable",
            "-t",
            "10",
            "-N2",
            "-p",
            "dev-g",
            "--open-mode=append",
            "-o",
            "/dev/null",
            str(script),
        ).strip()
        log = tmp_path / "log"
        box.wait_for(lambda: log.exists() and log.read_text().count("start") == 1)
        node = log.read_text().split()[-2]
        argv = [
            sys.executable,
            "-m",
            "hpctrain",
            "sandbox",
            "fault",
            node,
            action,
            "--name",
            "fault",
            "--dir",
            str(box.directory),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # A requeued job is held back for about two minutes; releasing it says that it is in the
        # queue again.
        box.wait_for(lambda: "PENDING" in box.ok("squeue", "-h", "-j", job, "-o", "%T"), 90)
        box.wait_for(
            lambda: box.ok("scontrol", "show", "job", job).split("Restarts=")[1].split()[0] == "1"
        )
        assert box.ok("sinfo", "-h", "-n", node, "-o", "%t").strip().startswith("down")
        told = subprocess.run(
            [*argv[:4], "status", *argv[7:]], capture_output=True, text=True, check=True
        )
        assert (f"warning: no slurmd runs for {node}" in told.stderr) is (action == "--crash")
        restore = ["--restart-slurmd"] if action == "--crash" else []
        for step in [*restore, "--resume"] if action == "--down" else restore:
            subprocess.run([*argv[:6], step, *argv[7:]], check=True, capture_output=True)
        box.wait_for(
            lambda: (
                box.ok("sinfo", "-h", "-n", node, "-o", "%t").strip() in ("idle", "mix", "alloc")
            )
        )
        pid = int(log.read_text().split()[-1])
        found = processes.read(pid)
        assert found is None or found.name != "slurm_script"


def test_down_ends_jobs_that_ignore_signals_and_spares_everybody_else(tmp_path: Path) -> None:
    with started(lumi(1), "stubborn", tmp_path / "stubborn") as box:
        bystander = subprocess.Popen(["sleep", "300"], env=dict(box.environ), cwd=box.directory)
        script = tmp_path / "job.sh"
        script.write_text(
            "#!/bin/bash\ntrap '' TERM HUP INT\n(setsid sleep 299 &)\nmkdir -p"
            f" /tmp/{os.geteuid()}-$SLURM_JOB_ID-miopen/x\ntouch {tmp_path}/up\nsleep 298\nsleep"
            " 297\n"
        )
        job = box.ok("sbatch", "--parsable", "-t", "5", "-o", "/dev/null", str(script)).strip()
        box.wait_for(lambda: (tmp_path / "up").exists())
        own, foreign = (
            Path(f"/tmp/{os.geteuid()}-{number}-miopen") for number in (job, f"{job}0000")
        )
        assert own.is_dir()
        foreign.mkdir(exist_ok=True)
        sandboxes.down("stubborn", box.directory, os.environ)
        assert not left_over(box.directory)
        assert not own.exists()
        foreign.rmdir()
        assert bystander.poll() is None
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    ("sent", "delay_s"),
    [
        (signal.SIGINT, 0.2),
        (signal.SIGINT, 0.5),
        (signal.SIGTERM, 0.7),
        (signal.SIGINT, 0.9),
        (signal.SIGHUP, 1.1),
    ],
)
def test_ctrl_c_at_any_moment_of_up_leaves_nothing_running(
    home: Path, sent: int, delay_s: float
) -> None:
    directory = state.state_dir("default", "", {"XDG_STATE_HOME": str(home)})
    up = start_up(home)
    time.sleep(delay_s)
    up.send_signal(sent)
    up.wait(timeout=60)
    record = state.load(directory)
    if record is not None and record.phase == "up":  # it was up before the signal came
        assert cli("status", home=home).returncode == 0
        return
    assert up.returncode in (errors.INTERRUPTED, -sent)
    assert not left_over(directory)
    assert not (directory / "etc").exists() and not (directory / state.RECORD).exists()


@pytest.mark.parametrize("moment", ["record", "munged", "slurmctld", "slurmd-nid000003"])
def test_up_works_after_an_up_that_was_killed_in_the_middle(home: Path, moment: str) -> None:
    directory = state.state_dir("default", "", {"XDG_STATE_HOME": str(home)})
    run = state.run_dir(directory, os.environ)
    up = start_up(home)
    path = directory / state.RECORD if moment == "record" else run / f"{moment}.pid"
    while not path.exists():
        assert up.poll() is None
    up.kill()
    up.wait()
    time.sleep(0.05)
    again = start_up(home)
    assert again.wait(timeout=120) == 0, (home / "said").read_text()
    assert cli("status", "--json", home=home).returncode == 0
    assert cli("down", home=home).returncode == 0
    assert not left_over(directory)


def start_up(home: Path) -> subprocess.Popen[bytes]:
    """`sandbox up` in the background; what it says is appended to `<home>/said`."""
    environ = {**os.environ, "XDG_STATE_HOME": str(home)}
    argv = [
        sys.executable,
        "-m",
        "hpctrain",
        "sandbox",
        "up",
        "--nodes",
        "4",
        "--slurm",
        "unpacked",
    ]
    with open(home / "said", "ab") as said:
        return subprocess.Popen(argv, env=environ, stderr=said, stdout=subprocess.DEVNULL)


def test_two_ups_at_the_same_moment_one_wins_or_both_agree(home: Path) -> None:
    ups = [start_up(home) for _ in range(3)]
    codes = [up.wait(timeout=120) for up in ups]
    assert 0 in codes and set(codes) <= {0, errors.ENVIRONMENT}
    assert (home / "said").read_text().count("another hpctrain") == codes.count(errors.ENVIRONMENT)
    assert cli("status", home=home).returncode == 0


def test_a_half_alive_sandbox_is_cleared_away_by_up(home: Path) -> None:
    assert start_up(home).wait(timeout=120) == 0
    directory = state.state_dir("default", "", {"XDG_STATE_HOME": str(home)})
    controller = processes.of_role(
        "slurmctld", state=str(directory), run=str(state.run_dir(directory, os.environ))
    )
    assert controller is not None
    os.kill(controller.pid, signal.SIGKILL)
    while controller.is_alive:
        time.sleep(0.01)
    status = cli("status", home=home)
    assert status.returncode == errors.NO and "half-alive" in status.stdout
    again = start_up(home)
    assert again.wait(timeout=120) == 0
    assert "clearing away" in (home / "said").read_text()


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    refused = cli("up", "--dir", str(tmp_path), home=tmp_path)
    assert refused.returncode == errors.REFUSED
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    down = cli("down", "--dir", str(tmp_path), home=tmp_path)
    assert down.returncode == 0 and (tmp_path / "precious").read_text() == "data"


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests already run as an ordinary user")
def test_an_ordinary_user_needs_nothing_but_hpctrain(tmp_path: Path) -> None:
    python = interpreter_for_everybody()
    home = Path(f"/tmp/hpctrain-test-user-{os.getpid()}")
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    import click
    import yaml

    paths = {str(Path(module.__file__ or "").parent.parent) for module in (click, yaml)} | {
        str(Path(__file__).parents[2])
    }
    environ = {
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sorted(paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        python,
        "-m",
        "hpctrain",
        "sandbox",
    ]

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*user, *argv],
            env=environ,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    try:
        up = run("up", "--nodes", "2", "--slurm", "unpacked")
        assert up.returncode == 0, up.stderr
        assert "unpacking" in up.stderr  # a home of its own has an empty cache
        job = run(
            "shell",
            "--",
            "sbatch",
            "--wait",
            "-t1",
            "-N2",
            "--ntasks-per-node=8",
            "-o",
            "out",
            "--wrap",
            "srun hostname",
        )
        assert job.returncode == 0, job.stderr
        assert sorted((home / "out").read_text().split()) == ["nid000001"] * 8 + ["nid000002"] * 8
        (home / "x.sif").touch()
        inside = run("shell", "--", "singularity", "exec", "x.sif", "ls", "/work", "/scratch")
        assert inside.returncode == 2 and "/scratch" in inside.stderr
    finally:
        down = run("down")
        shutil.rmtree(home)
    assert down.returncode == 0, down.stderr


def interpreter_for_everybody() -> str:
    """A Python that user 65534 may start: ours, or the system's where ours lies in root's home."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        # Through a shell: setpriv's own exec still has root's capabilities.
        check = [
            *"setpriv --reuid=65534 --regid=65534 --clear-groups sh -c".split(),
            '"$0" -c "$1"; exit $?',
            python,
        ]
        script = "import sys; sys.exit(sys.version_info < (3, 9))"
        if subprocess.run([*check, script], check=False, capture_output=True).returncode == 0:
            return python
    pytest.fail("no Python >= 3.9 that an ordinary user may start: apt-get install python3")
