"""The built-in trainer as a chain on the real Slurm: killed in the middle, resumed, exported from its run directory."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from hpctrain.tokenize.indexed_dataset import write_index

pytestmark = pytest.mark.slurm
MODEL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def test_a_killed_link_is_resumed_by_the_next_one_and_the_run_is_exported(idle, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    document = np.array([7, 20, 21, 7, 8, 21, 22, 8, 2], dtype=np.uint16)
    np.tile(document, 200).tofile(tmp_path / "data.bin")
    with open(tmp_path / "data.idx", "wb") as index:
        write_index(index, "uint16", iter([np.full(200, len(document), dtype=np.int32)]), 200)
    run = {
        "name": "ft", "site": "lumi", "recipe": "sft", "account": "project_465000000", "partition": "small", "nodes": 1,
        "tasks_per_node": 2, "time": "5:00", "checkpoint": {"dir": "ck"}, "data": {"train": ["data"]}, "chain": {"jobs": 2},
        "recipe_options": {"model": "model.json", "python": sys.executable},
        "config": {"seq_length": 32, "train_iters": 200, "train_micro_batch_size_per_gpu": 1, "checkpoint_factor": 50,
                   "log_interval": 25, "precision": "fp32", "zero_stage": 1, "lr": 1e-2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    hpctrain = [sys.executable, "-m", "hpctrain"]
    folder, checkpoints = tmp_path / "runs" / "ft", tmp_path / "ck"

    def links(event):
        lines = (folder / "links.jsonl").read_text().splitlines() if (folder / "links.jsonl").exists() else []
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def wait_for(condition):
        deadline = time.monotonic() + 120
        while not condition():
            logs = [path.read_text()[-3000:] for path in (folder / "logs").glob("*")]
            assert time.monotonic() < deadline, "\n".join(logs)
            time.sleep(0.1)

    idle.ok(*hpctrain, "chain", "--jobs", "2", "--yes", cwd=tmp_path)
    wait_for(lambda: (checkpoints / "latest").exists())
    idle.ok("scancel", "--signal=KILL", links("begin")[0]["job_id"])
    wait_for(lambda: [end["link"] for end in links("end")][-1:] == [2])

    first, second = links("begin")
    assert (first["mode"], second["mode"]) == ("scratch", "resume")
    assert second["iteration"] % 50 == 0 and 50 <= second["iteration"] < 200
    assert links("end")[-1]["exit_code"] == 0 and (checkpoints / "latest").read_text() == "global_step200"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["link"] for line in metrics} == {1, 2} and metrics[-1]["loss"] < metrics[0]["loss"] / 2
    idle.ok(*hpctrain, "export", "runs/ft", "-o", "model", cwd=tmp_path)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 1000
