"""The names by which job scripts start the trainers stay: run directories made by earlier versions
call them."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "train.sft",
        "train.dpo",
        "train.trl",
        "train.hf_sft",
        "train.trl.validate",
        "train.hf_sft.validate",
    ],
)
def test_a_trainer_answers_to_each_of_its_names(name):
    done = subprocess.run(
        [sys.executable, "-m", f"hpctrain.{name}", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr


def test_the_deepspeed_trainer_asks_for_its_orders():
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain.train.sft"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2 and "HPCTRAIN_" in done.stderr
