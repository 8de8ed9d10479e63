"""The real command, killed, signalled and stopped: nothing is lost, and every rank leaves
together."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from start_ranks import start_ranks

from .conftest import Bench

# recipes.md §5: how logs of GPT-NeoX are read.
N = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf|NaN|Inf)"
NEOX_LINE = (
    rf"(?:samples/sec:\s*{N}\s*\|)?\s*iteration\s+(\d+)/\s*(\d+)\s*\|.*?learning"
    rf" rate:\s*{N}\s*\|.*?lm[_ ]loss:\s*{N}"
)
OTHERS = (
    rf"grad norm: {N}",
    r"number of nan iterations:\s*(\d+)",
    r"number of skipped iterations:\s*(\d+)",
    rf"samples per second: {N}",
    rf"tokens per gpu per second \(tgs\): {N}",
    rf"TFLOPs: {N}",
)
LONG = {
    "train_iters": 4000,
    "train_batch_size": 2,
    "checkpoint_factor": 10,
    "log_interval": 1,
    "zero_stage": 2,
}


def wait_for(path: Path, process: subprocess.Popen[str], limit_s: float = 300) -> None:
    end = time.monotonic() + limit_s
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_killed_in_the_middle_and_resumed_is_the_uninterrupted_run(
    bench: Bench, same_tensors: Callable[[Path, Path], list[str]]
) -> None:
    process = start_ranks(["-m", "hpctrain.train.sft"], bench.order("killed", **LONG))[0]
    wait_for(bench.path / "killed" / "global_step20", process)
    process.kill()
    process.communicate()

    tag = bench.latest("killed")
    step = int(tag.removeprefix("global_step"))
    with open(bench.path / "killed.run" / "metrics.jsonl", "a") as file:
        file.write('{"torn')
    end = {**LONG, "train_iters": step + 10, "lr_decay_iters": 4000}
    answers = bench.train_many(
        [
            bench.order("killed", "resume", bench.path / "killed" / tag, **end),
            bench.order("straight", **end),
        ],
        1,
    )

    assert step >= 10 and answers == [(0, [])] * 2
    last = f"global_step{step + 10}"
    assert same_tensors(bench.path / "killed" / last, bench.path / "straight" / last) == []
    lines = (bench.path / "killed.run" / "metrics.jsonl").read_text().splitlines()
    torn = lines.index('{"torn')
    assert f'"iteration": {step + 1},' in lines[torn + 1]


def test_the_stop_signal_to_one_rank_saves_on_all_and_exits_0(bench: Bench) -> None:
    order = bench.order("signalled", **{**LONG, "checkpoint_factor": 3900})
    processes = start_ranks(["-m", "hpctrain.train.sft"], order, num_ranks=2)
    wait_for(bench.path / "signalled.run" / "metrics.jsonl", processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    texts = [process.communicate(timeout=300) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], texts
    tag = bench.latest("signalled")
    assert (
        f"stopped by signal USR1: saved at iteration {tag.removeprefix('global_step')} of 4000,"
        " exit 0" in texts[0][0]
    )
    assert len(list((bench.path / "signalled" / tag).glob("*_optim_states.pt"))) == 2
    lines = [
        line for line in texts[0][0].splitlines() if "iteration " in line and "lm_loss" in line
    ]
    assert lines and all(re.search(NEOX_LINE, line) for line in lines)
    assert all(re.search(pattern, lines[-1]) for pattern in OTHERS)


def test_a_signal_before_training_starts_is_not_lost_and_the_stop_file_ends_the_run_after_a_save(
    bench: Bench,
) -> None:
    early = start_ranks(["-m", "hpctrain.train.sft"], bench.order("early", **LONG))[0]
    # The handler is set once the config is read, seconds before torch is there.
    while "SigCgt" not in (status := Path(f"/proc/{early.pid}/status").read_text()) or not (
        int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1
    ):
        time.sleep(0.005)
    early.send_signal(signal.SIGUSR1)
    run = bench.path / "stop-file.run"
    run.mkdir()
    (run / "STOP").touch()
    late = start_ranks(["-m", "hpctrain.train.sft"], bench.order("stop-file", **LONG))[0]
    early_out, late_out = (process.communicate(timeout=300) for process in (early, late))

    assert early.returncode == 0 and "stopped by signal USR1: nothing new to save" in early_out[0]
    # nothing was trained, so there is nothing to save
    assert not list(bench.path.glob("early/global_step*"))
    assert late.returncode == 0 and "stopped by the stop file" in late_out[0]
    assert bench.latest("stop-file") == "global_step10"


def test_every_mistake_is_said_once_with_its_place_and_nothing_is_written(bench: Bench) -> None:
    order = bench.order(
        "mistakes", lr="fast", train_iter=5, zero_stage=7, loss_mask_pairs=[7], model="gone.json"
    )
    answers = bench.train(order, num_ranks=2)

    assert [code for code, *_ in answers] == [2, 2]
    assert answers[1][1:] == ("", "") and answers[0][1] == ""
    for what in (
        "`lr: fast` must be a number",
        "unknown key `train_iter`",
        "did you mean `train_iters`",
        "more than 3",
        "flat list",
        "gone.json` does not exist",
    ):
        assert what in answers[0][2]
    assert "mistakes.yml:1:" in answers[0][2] and "Traceback" not in answers[0][2]
    assert not (bench.path / "mistakes").exists() and not (bench.path / "mistakes.run").exists()
