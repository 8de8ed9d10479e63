"""Whatever stands in a run's state files, every verb ends soon, with an answer or an error of its
own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[2] / "tools/fuzz"


def test_a_hundred_mutations_of_the_state_files_hold_no_verb():
    done = subprocess.run(
        [sys.executable, FUZZ, "--seed", "22", "--count", "100"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stdout + done.stderr
