"""The stand-in for singularity binds for real: what the site's container would not see is not
there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.sandbox import nodeview, packages

from .conftest import Sandbox, lumi, started

pytestmark = pytest.mark.slurm


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory that no default mount shows: not below $HOME, /tmp or the working directory."""
    path = Path(tempfile.mkdtemp(prefix="hpctrain-outside-", dir="/var"))
    (path / "data").write_text("weights")
    yield path
    shutil.rmtree(path)


def run(
    box: Sandbox, tmp_path: Path, *words: str, runtime: str = "singularity", **environ: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "image.sif").touch()
    words = tuple(str(tmp_path / "image.sif") if word == "IMAGE" else word for word in words)
    return box.run(runtime, *words, cwd=tmp_path, **environ)


needs_var = pytest.mark.skipif(
    not os.access("/var", 2), reason="only root may make a directory in /var"
)


@needs_var
@pytest.mark.parametrize("runtime", ["singularity", "apptainer"])
def test_a_path_is_visible_only_when_it_is_bound(
    sandbox: Sandbox, tmp_path: Path, outside: Path, runtime: str
) -> None:
    read = ("IMAGE", "cat", f"{outside}/data")
    missing = run(sandbox, tmp_path, "exec", *read, runtime=runtime)
    assert missing.returncode == 1 and "No such file" in missing.stderr
    for words, environ in (
        (("exec", "-B", str(outside), *read), {}),
        (("exec", f"--bind={outside}:{outside}:ro", *read), {}),
        (("run", "-B", f"/usr,{outside}", *read), {}),
        (("exec", *read), {"SINGULARITY_BIND": str(outside)}),
        (("exec", *read), {"APPTAINER_BIND": f"{outside}:{outside}"}),
        (("exec", "-B", f"{outside}:/scratch/x y", "IMAGE", "cat", "/scratch/x y/data"), {}),
        (
            (
                "exec",
                "--mount",
                f"type=bind,src={outside},dst=/scratch",
                "IMAGE",
                "cat",
                "/scratch/data",
            ),
            {},
        ),
        (
            (
                "exec",
                "-B",
                f"{outside}/data:/usr/lib64/libcxi.so.1",
                "IMAGE",
                "cat",
                "/usr/lib64/libcxi.so.1",
            ),
            {},
        ),
    ):
        done = run(sandbox, tmp_path, *words, runtime=runtime, **environ)
        assert (done.returncode, done.stdout) == (0, "weights"), (words, done.stderr)
    assert not Path("/usr/lib64/libcxi.so.1").exists()


@needs_var
def test_bound_paths_are_written_through_and_nothing_else_is(
    sandbox: Sandbox, tmp_path: Path, outside: Path
) -> None:
    def touch(path: str, *options: str) -> int:
        return run(sandbox, tmp_path, "exec", *options, "IMAGE", "touch", path).returncode

    assert touch(f"{outside}/made", "-B", str(outside)) == 0 and (outside / "made").exists()
    assert (
        touch(f"{outside}/not", "-B", f"{outside}:{outside}:ro") == 1
        and not (outside / "not").exists()
    )
    # the working directory is mounted by default
    assert touch("here") == 0 and (tmp_path / "here").exists()
    for path in ("/made", "/usr/made", "/etc/made", "/scratch", f"{outside}/never"):
        assert touch(path) == 1
        assert not Path(path).exists()


def test_the_start_fails_as_singularitys_does(sandbox: Sandbox, tmp_path: Path) -> None:
    for words, message in (
        (("exec", "/nowhere/x.sif", "true"), "could not open image /nowhere/x.sif"),
        (("exec", "-B", "/nowhere", "IMAGE", "true"), "mount source /nowhere doesn't exist"),
        (("exec", "--frobnicate", "IMAGE", "true"), "unknown flag: --frobnicate"),
        (("exec", "--pwd", "/nowhere", "IMAGE", "true"), "chdir /nowhere"),
        (("exec", "docker://ubuntu", "true"), "does not fetch images"),
        (("pull", "docker://ubuntu"), "knows exec, run and shell"),
    ):
        done = run(sandbox, tmp_path, *words)
        assert done.returncode == 255 and message in done.stderr, (words, done.stderr)


def test_the_environment_inside_is_the_one_singularity_makes(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    nasty = "$(touch canary) \"q\" 'a' ; \\ é"
    environ = {
        "MINE": nasty,
        "SINGULARITYENV_INSIDE": nasty,
        "SINGULARITYENV_PREPEND_PATH": "/first",
        "LD_LIBRARY_PATH": "/host",
    }

    def inside(*options: str) -> dict[str, str]:
        done = run(sandbox, tmp_path, "exec", *options, "IMAGE", "env", "-0", **environ)
        assert done.returncode == 0, done.stderr
        return dict(item.partition("=")[::2] for item in done.stdout.split("\0") if item)

    found = inside("--env", "A=1,B=x=y")
    assert found["MINE"] == found["INSIDE"] == nasty
    assert (found["A"], found["B"], found["SINGULARITY_NAME"]) == ("1", "x=y", "image.sif")
    assert found["PATH"].startswith("/first:") and "/host" not in found["LD_LIBRARY_PATH"]
    assert not any(key.startswith("SINGULARITYENV_") for key in found)
    clean = inside("--cleanenv")
    assert "MINE" not in clean and clean["INSIDE"] == nasty
    assert not (tmp_path / "canary").exists()


def test_arguments_exit_codes_and_signals_pass_through(sandbox: Sandbox, tmp_path: Path) -> None:
    words = ["a b", "", "$(touch canary)", "-x", "k=v", "é\n"]
    done = run(
        sandbox,
        tmp_path,
        "exec",
        "IMAGE",
        "python3",
        "-c",
        "import sys; print(sys.argv[1:])",
        *words,
    )
    assert done.stdout == f"{words}\n"
    assert run(sandbox, tmp_path, "exec", "IMAGE", "sh", "-c", "exit 42").returncode == 42
    text = sandbox.job(
        tmp_path,
        f"""
        srun -n2 singularity exec {tmp_path}/image.sif bash -c 'trap "echo caught; exit 0" USR1; sleep 60 & wait' &
        while ! scontrol listpids 2>/dev/null | grep -q "$SLURM_JOB_ID .*0 "; do sleep 0.2; done
        sleep 1
        scancel -s USR1 $SLURM_JOB_ID.0
        wait; echo step ended with $?
        """,
        "-N2",
    )
    assert text.count("caught") == 2 and "step ended with 0" in text


def test_the_interpreter_and_the_nodes_are_visible_inside(sandbox: Sandbox, tmp_path: Path) -> None:
    code = (
        "import click, socket; print(socket.gethostname(), socket.gethostbyname('nid000002')[:7])"
    )
    (tmp_path / "image.sif").touch()
    text = sandbox.job(
        tmp_path, f'srun -n2 singularity exec {tmp_path}/image.sif python3 -c "{code}"\n', "-N2"
    )
    assert sorted(text.split("\n")[:2]) == ["nid000001 127.77.", "nid000002 127.77."]


def test_a_sites_paths_stand_where_the_job_expects_them(tmp_path: Path) -> None:
    scratch = tmp_path / "fs"
    (scratch / "project_1").mkdir(parents=True)
    (tmp_path / "image.sif").touch()
    with started(
        lumi(2, mounts=((str(scratch), "/scratch"),)), "mounted", tmp_path / "mounted"
    ) as box:
        image = tmp_path / "image.sif"
        text = box.job(
            tmp_path,
            f"""
            cd /scratch/project_1 && pwd && echo hello >from_job
            cd / && srun -n1 singularity exec {image} ls /scratch 2>&1
            srun -n1 singularity exec -B /scratch {image} cat /scratch/project_1/from_job
            """,
        )
    assert text.split("\n")[0] == "/scratch/project_1"
    assert "cannot access '/scratch'" in text and "hello" in text
    assert (scratch / "project_1" / "from_job").read_text() == "hello\n"


def test_where_namespaces_are_forbidden_the_reason_is_given() -> None:
    box = packages.Toolbox("", {"bwrap": packages.Program("/bin/false")}, "")
    assert "does not let bubblewrap make namespaces" in nodeview.unavailable(box)
    assert "not installed" in nodeview.unavailable(packages.Toolbox("", {}, ""))
