"""Slurm's commands as programs of our own on PATH: what was asked is noted, what is answered is the
test's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

# Answers with the file beside it, notes its own words, its standard input and what leaks into it.
_FAKE = """#!{python}
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
name = os.path.basename(sys.argv[0])
leaks = sorted(key for key in os.environ if key.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI")))
with open(os.path.join(here, "asked"), "a") as file:
    note = {{"argv": [name, *sys.argv[1:]], "zone": os.environ.get("TZ"), "leaks": leaks}}
    file.write(json.dumps(note) + "\\n")
answer = json.load(open(os.path.join(here, name + ".answer")))
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""


class Fake:
    """`says(name, …)` puts a command on PATH; `asked` is what all of them were asked, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def says(self, name: str, out: str = "", err: str = "", code: int = 0) -> None:
        path = self.folder / name
        path.write_text(_FAKE.format(python=sys.executable))
        path.chmod(0o755)
        answer = {"out": out, "err": err, "code": code}
        (self.folder / f"{name}.answer").write_text(json.dumps(answer))

    @property
    def asked(self) -> list[dict]:
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("PATH", f"{folder}")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert os.access(folder / "env", os.X_OK)
    return Fake(folder)
