"""The wheel holds all it needs: installed into an empty environment, it renders from another
directory."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """\
name: from-a-wheel
site: lumi
recipe: command
account: project_465001281
partition: standard-g
time: 1h
recipe_options: {argv: [hostname], workdir: /}
"""


def test_the_installed_wheel_renders_from_the_root_directory(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "click", "jinja2", "pyyaml"], check=True, capture_output=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True)
    (tmp_path / "run.yaml").write_text(RUN)
    program = tmp_path / "venv" / "bin" / "hpctrain"
    done = subprocess.run(
        [str(program), "render", str(tmp_path / "run.yaml")],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/from-a-wheel/job.sbatch\n"), (
        done.stderr
    )
    assert (tmp_path / "runs/from-a-wheel/runtime/__init__.py").is_file()
    assert "site lumi" in Path(done.stdout.strip()).read_text()
