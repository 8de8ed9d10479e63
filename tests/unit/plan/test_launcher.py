"""Who stands between srun and the program is seen in the command, and a signal passes it by."""

from __future__ import annotations

import json

import pytest

from hpctrain.plan.launcher import launcher, shell_between
from hpctrain.plan.load import load_plan


@pytest.mark.parametrize(
    "argv, found",
    [
        (["torchrun", "--nnodes", "2", "w.py"], "torchrun"),
        (["/opt/venv/bin/torchrun", "w.py"], "torchrun"),
        (["python3", "-u", "-m", "torch.distributed.run", "w.py"], "torch.distributed.run"),
        (["uv", "run", "torchrun", "w.py"], "torchrun"),
        (["accelerate", "launch", "w.py"], "accelerate launch"),
        (["accelerate", "config"], None),
        (["python", "-m", "accelerate.commands.launch", "w.py"], "accelerate.commands.launch"),
        (["deepspeed", "--num_gpus", "2", "w.py"], "deepspeed"),
        (["bash", "-c", "cd x && deepspeed w.py"], "deepspeed"),
        (["bash", "-lc", "source env.sh\nexec torchrun --standalone w.py"], "torchrun"),
        (["python", "train.py", "--strategy", "deepspeed", "--torchrun", "no"], None),
        (["python", "torchrun_report.py"], None),
        (["hostname"], None),
        ([], None),
    ],
)
def test_launchers_are_known_by_the_command_that_starts_them(argv, found):
    assert launcher(argv) == found


@pytest.mark.parametrize(
    "argv, found",
    [
        (["bash", "-c", "python w.py"], None),
        (["bash", "-c", "a && exec python w.py"], None),
        (["bash", "-c", "a; python w.py"], "a; python w.py"),
        (["env", "A=1", "/bin/sh", "-euc", "a\npython w.py"], "a\npython w.py"),
        (["bash", "-u", "train.sh", "x"], "train.sh"),
        (["./train.sh"], "./train.sh"),
        (["python", "train.py", "bash", "-c", "a; b"], None),
        (["bash"], None),
        (["bash", "-c"], None),
        ([], None),
    ],
)
def test_a_shell_that_waits_for_the_program_is_told_from_one_that_becomes_it(argv, found):
    assert shell_between(argv) == found


def planned(tmp_path, argv, more=""):
    text = f"name: r\nsite: local\nrecipe: command\ntime: 1h\n{more}"
    text += f"recipe_options: {{argv: {json.dumps(argv)}, signal: true}}\n"
    (tmp_path / "run.yaml").write_text(text)
    plan = load_plan(str(tmp_path / "run.yaml"), (), None).plan
    return plan.signal, [
        f"{problem.level}: {problem.what} {problem.hint}" for problem in plan.problems
    ]


def test_a_launcher_is_started_with_the_signal_ignored_and_the_program_gets_it(tmp_path):
    signal, said = planned(tmp_path, ["bash", "-c", "torchrun w.py; echo done"])

    assert signal["passed_by"] == "torchrun" and said == []


@pytest.mark.parametrize(
    "argv, more, words",
    [
        (
            ["torchrun", "w.py"],
            "sbatch: {signal: TERM@300}\n",
            ["warning", "at SIGTERM `torchrun` ends", "delete it"],
        ),
        (
            ["bash", "-c", "trap : USR1; torchrun w.py"],
            "",
            ["warning", "SIGUSR1 ends `torchrun` too", "take the `trap`"],
        ),
        (
            ["bash", "-c", "a\npython w.py"],
            "",
            ["warning", "the shell that runs `a`", "`trap : USR1`"],
        ),
        (["./train.sh"], "", ["note", "the shell that runs `./train.sh`", "`exec`"]),
    ],
)
def test_what_cannot_be_helped_is_said_before_the_queue_with_the_way_out(
    tmp_path, argv, more, words
):
    signal, [said] = planned(tmp_path, argv, more)

    assert signal["passed_by"] is None and all(word in said for word in words)


@pytest.mark.parametrize(
    "argv",
    [
        ["python", "w.py"],
        ["bash", "-c", "trap : USR1; a; python w.py"],
        ["bash", "-c", "a; exec python w.py"],
    ],
)
def test_a_command_that_takes_the_signal_right_is_not_spoken_of(tmp_path, argv):
    assert planned(tmp_path, argv) == (
        {"name": "USR1", "lead_s": 120, "forward": True, "passed_by": None},
        [],
    )
