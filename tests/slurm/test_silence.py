"""Where no Slurm answers, nothing is said about the run.

With real commands, of a controller that is down or unknown.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm


@pytest.fixture(params=["down", "unknown"])
def silent(request, sandbox, tmp_path):
    """PATH with this Slurm's commands, for which the controller is down, or which have no
    configuration."""
    real = Path(shutil.which("sbatch", path=sandbox.environ["PATH"])).parent
    config = Path(sandbox.environ["SLURM_CONF"])
    dead = tmp_path / "slurm.conf"
    text = re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=1", config.read_text())
    dead.write_text(re.sub(r"(?m)^MessageTimeout=.*\n", "", text) + "MessageTimeout=2\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    for path in real.iterdir():
        words = path.read_text()
        if request.param == "down":
            words = words.replace(f"SLURM_CONF={config}", f"SLURM_CONF={dead}")
        else:
            words = words.replace(f"SLURM_CONF={config}\nexport SLURM_CONF\n", "unset SLURM_CONF\n")
        (commands / path.name).write_text(words)
        (commands / path.name).chmod(0o755)
    return sandbox.environ["PATH"].replace(str(real), str(commands))


def test_no_verb_takes_silence_for_an_answer(silent, sandbox, tmp_path):
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "r",
                "site": "local",
                "recipe": "command",
                "nodes": 1,
                "time": "5:00",
                "chain": {"jobs": 2},
                "checkpoint": {"dir": "ck"},
                "sbatch": {"cpus-per-task": 1, "mem": "100M"},
                "recipe_options": {
                    "argv": ["sleep", "60"],
                    "layout": "dcp",
                    "target_iteration": 10,
                    "save_every": 5,
                },
            }
        )
    )

    def hpctrain(*args):
        done = sandbox.run(
            sys.executable, "-m", "hpctrain", *args, cwd=tmp_path, PATH=silent, timeout_s=300
        )
        said = done.stdout + done.stderr
        assert "\\n" not in said and "Traceback" not in said and "refuse" not in said, said
        return done.returncode, said

    code, said = hpctrain("check")
    assert code == 0 and "Slurm did not answer" in said and "its own opinion is not known" in said
    assert hpctrain("plan")[0] == 0
    ledger = tmp_path / "runs/r/ledger.jsonl"
    code, said = hpctrain("chain", "--yes")
    assert code == 3 and "Slurm did not answer" in said and not ledger.exists()
    first = {"event": "submitted", "link": 1, "job_id": "4711", "tag": "hpctrain:u:1:link:ab"}
    ledger.write_text(json.dumps(first) + "\n")
    code, said = hpctrain("status", "runs/r")
    assert "could not see: squeue: Slurm did not answer" in said and "unknown" in said
    for verb in (
        ("cancel",),
        ("stop",),
        ("site", "new", "here", "--dry-run"),
        ("chain", "--extend", "1", "--yes"),
    ):
        target = ("runs/r",) if verb[0] in ("cancel", "stop") else ()
        code, said = hpctrain(*verb, *target)
        assert code == 3 and "Slurm did not answer" in said, (verb, said)
        if verb == ("stop",):  # links read the file, whether Slurm answers or not
            (tmp_path / "runs/r/STOP").unlink()
            assert "STOP` is there" in said
    code, said = hpctrain("cost", "runs/r")
    assert code in (0, 3) and "Slurm did not answer" in said
    assert not [line for line in ledger.read_text().splitlines() if '"cancelled"' in line]
