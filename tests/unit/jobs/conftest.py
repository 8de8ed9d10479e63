"""A Slurm of a few lines on PATH: sbatch hands out numbers, squeue lists them, and a test says what
has ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

_PROGRAM = """#!{python}
import json, os, sys
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "state.json")
state = json.load(open(path))
words = sys.argv[1:]
name = os.path.basename(sys.argv[0])
state["asked"].append([name, *words])
code = 0
if name == "sbatch" and state["refuses_after"] is not None and len(state["jobs"]) >= state["refuses_after"]:
    sys.stderr.write("sbatch: error: QOSMaxSubmitJobPerUserLimit\\n")
    code = 1
elif name == "sbatch":
    job_id = str(100 + len(state["jobs"]))
    comment = next((word[10:] for word in words if word.startswith("--comment=")), "")
    state["jobs"][job_id] = {{"state": "PENDING", "comment": comment, "words": words}}
    print(job_id)
elif name == "squeue":
    for job_id, job in state["jobs"].items():
        if not job.get("forgotten"):
            fields = [job_id, job["state"], "None", "N/A", "N/A", "", "1", "N/A", "/x", "ft", job["comment"], "(null)"]
            print("\\x1f".join(fields))
elif name == "scancel":
    for job_id in words:
        if job_id in state["jobs"]:
            state["jobs"][job_id]["state"] = "CANCELLED"
json.dump(state, open(path, "w"))
sys.exit(code)
"""


class Cluster:
    """`jobs`: id -> what was submitted; assign to `ends` and `forgets` what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._write({"jobs": {}, "asked": [], "refuses_after": None})

    def _read(self) -> dict:
        return json.loads((self.folder / "state.json").read_text())

    def _write(self, state: dict) -> None:
        (self.folder / "state.json").write_text(json.dumps(state))

    @property
    def jobs(self) -> dict:
        return self._read()["jobs"]

    @property
    def submitted(self) -> list[list[str]]:
        """The words of every sbatch, in order."""
        return [words[1:] for words in self._read()["asked"] if words[0] == "sbatch"]

    def change(self, job_id: str, **fields) -> None:
        state = self._read()
        state["jobs"][job_id].update(fields)
        self._write(state)

    def refuse_after(self, count: int | None) -> None:
        self._write({**self._read(), "refuses_after": count})


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (folder / name).write_text(_PROGRAM.format(python=sys.executable))
        (folder / name).chmod(0o755)
    (folder / "env").symlink_to("/usr/bin/env")
    monkeypatch.setenv("PATH", str(folder))
    return Cluster(folder)
