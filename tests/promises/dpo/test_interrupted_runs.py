"""Ended at any moment, by a signal that asks or one that does not, a run goes on and ends as if
nothing had been."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from start_ranks import start_ranks

from .conftest import Bench

ARGV = ["-m", "hpctrain.train.dpo", "--config"]


def wait_for(path: Path, lines: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signalled_killed_and_run_again_alone_as_config_dpo_yaml_says(
    bench: Bench, same_state: Callable[[Path, Path], list[str]]
) -> None:
    straight, folder = bench.path / "straight", bench.path / "interrupted"
    training = {"max_steps": 60, "save_steps": 1000, "log_steps": 1, "batch_size": 8, "fsdp": False}
    for where in (straight, folder):
        where.mkdir()
    # One process per line of the run: the first is asked to stop, the second killed, the third left
    # to end.
    path = bench.config("alone", training, mount_dir=str(folder / "out"))
    (process,) = start_ranks([*ARGV, str(path)], {}, cwd=folder)
    wait_for(folder / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGUSR1)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopped by signal USR1: saved at iteration" in said
    (kept,) = (folder / "out" / "checkpoints").glob("step-*")
    assert (folder / "out" / "checkpoints" / "latest").read_text() == kept.name

    (process,) = start_ranks([*ARGV, str(path)], {}, cwd=folder)
    wait_for(folder / "metrics.jsonl", int(kept.name[5:]) + 2, process)
    process.kill()
    process.communicate()

    last = start_ranks([*ARGV, str(path)], {}, cwd=folder)
    whole = start_ranks(
        [*ARGV, str(bench.config("straight", training, mount_dir=str(straight)))], {}, cwd=straight
    )
    for mode, (process,) in (("resume", last), ("scratch", whole)):
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert f"mode {mode}" in said, said
    assert (
        same_state(folder / "out" / "checkpoints" / "step-60", straight / "checkpoints" / "step-60")
        == []
    )
    one, two = (
        (where / "dpo_model" / "model.safetensors").read_bytes()
        for where in (folder / "out", straight)
    )
    assert one == two
    lines = (folder / "out" / "logs" / "margins" / "margins_log.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == set(range(1, 61))

    # Once done it stays done: nothing is trained or written again.
    before = {file: file.stat().st_mtime_ns for file in (folder / "out" / "dpo_model").iterdir()}
    (process,) = start_ranks([*ARGV, str(path)], {}, cwd=folder)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "nothing to train" in said, errors
    assert {
        file: file.stat().st_mtime_ns for file in (folder / "out" / "dpo_model").iterdir()
    } == before


def test_the_trained_model_loads_and_a_foreign_dpo_model_is_set_aside(bench: Bench) -> None:
    run = bench.path / "foreign.run"
    (run / "dpo_model").mkdir(parents=True)
    (run / "dpo_model" / "precious").write_text("mine")

    (answer,) = bench.train_many(
        [bench.order("foreign", precision="bf16", training={"max_steps": 2})], 1
    )

    assert answer.code == 0, answer
    assert (run / "set_aside_dpo_model" / "precious").read_text() == "mine"
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        run / "dpo_model", local_files_only=True
    )
    assert type(model).__name__ == "LlamaForCausalLM" and str(model.dtype) == "torch.bfloat16"
    assert json.loads((run / "dpo_model" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert transformers.AutoTokenizer.from_pretrained(run / "dpo_model").chat_template


def test_what_is_wrong_with_a_run_is_said_and_never_a_traceback(bench: Bench) -> None:
    (bench.path / "broken.yaml").write_text(
        "policy_name: ./policy\nprecision: fp8\ndataset: {dataset_name: ./none}\n"
    )
    for argv, words in (
        ([*ARGV, str(bench.path / "broken.yaml")], ["broken.yaml:2:12", "broken.yaml:3:"]),
        ([*ARGV, str(bench.path / "absent.yaml")], ["absent.yaml"]),
        (ARGV[:2], ["no config is given"]),
    ):
        (process,) = start_ranks(argv, {}, cwd=bench.path)
        said, errors = process.communicate(timeout=60)
        assert process.returncode in (2, 3) and all(word in errors for word in words), (
            said,
            errors,
        )
        assert "Traceback" not in errors
