"""The built-in trainers as a pipeline on the real Slurm: SFT killed in the middle, resumed, its
model handed on to DPO."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import sentencepiece

from hpctrain.data.dataset.indexed_dataset import write_index

pytestmark = pytest.mark.slurm
MODEL = {
    "model_type": "llama",
    "vocab_size": 304,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def write_data(folder):
    """A tiny SentencePiece model, dialogues in its ids, and preferences in its words."""
    prefix = folder / "spm"
    control = ["<|endoftext|>", "<c4>", "<c5>", "<c6>", "<|user|>", "<|assistant|>"]
    lines = [f"{number} rivers and {number + 1} stones" for number in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=control,
        minloglevel=2,
        num_threads=1,
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    documents = [
        np.array([7, *sp.encode(line), 7, 8, *sp.encode(line), 8, 3], dtype=np.uint16)
        for line in lines
    ] * 4
    np.concatenate(documents).tofile(folder / "data.bin")
    with open(folder / "data.idx", "wb") as index:
        write_index(
            index,
            "uint16",
            iter([np.array(list(map(len, documents)), dtype=np.int32)]),
            len(documents),
        )
    rows = [{"prompt": line, "chosen": line, "rejected": line[::-1]} for line in lines[:16]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(str(folder / "model.safetensors"))


def test_sft_then_dpo_killed_in_the_middle_resumed_and_the_second_starts_from_the_firsts_model(
    idle, tmp_path
):
    """One graph: the SFT's first link is killed, its second ends the run and leaves the model that
    the DPO begins with."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    write_data(tmp_path)
    common = {
        "site": "lumi",
        "account": "project_465000000",
        "partition": "small",
        "nodes": 1,
        "tasks_per_node": 2,
        "time": "5:00",
    }
    sft = {
        **common,
        "name": "ft",
        "recipe": "sft",
        "checkpoint": {"dir": "ck"},
        "data": {"train": ["data"]},
        "recipe_options": {
            "model": "model.json",
            "tokenizer": "spm.model",
            "python": sys.executable,
        },
        "config": {
            "seq_length": 64,
            "train_iters": 200,
            "train_micro_batch_size_per_gpu": 1,
            "checkpoint_factor": 50,
            "log_interval": 25,
            "precision": "fp32",
            "zero_stage": 1,
            "lr": 1e-2,
            "export_dir": "models/ft",
        },
    }
    # It learns next to nothing in its two steps, so its model is still the SFT's.
    dpo = {
        **common,
        "tasks_per_node": 1,
        "name": "pref",
        "recipe": "dpo",
        "checkpoint": {"dir": "ck pref"},
        "data": {"train": ["pairs.jsonl"]},
        "recipe_options": {"python": sys.executable},
        "config": {
            "precision": "fp32",
            "dataset": {"max_len": 64},
            "mount_dir": "models/pref",
            "dpo_training": {
                "batch_size": 4,
                "max_steps": 2,
                "log_steps": 1,
                "save_steps": 2,
                "learning_rate": 1e-6,
                "fsdp": False,
            },
        },
    }
    (tmp_path / "ft.yaml").write_text(json.dumps(sft))
    (tmp_path / "pref.yaml").write_text(json.dumps(dpo))
    stages = {
        "sft": {"run": "ft.yaml", "jobs": 2},
        "dpo": {"run": "pref.yaml", "from": "sft", "hand_over": "model"},
    }
    (tmp_path / "pipeline.yaml").write_text(json.dumps({"name": "both", "stages": stages}))
    hpctrain = [sys.executable, "-m", "hpctrain"]
    folder, checkpoints = tmp_path / "runs" / "both" / "sft", tmp_path / "ck"

    def links(event, stage="sft"):
        path = folder.parent / stage / "links.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def logs():
        return "\n".join(
            path.read_text()[-4000:] for path in sorted(folder.parent.glob("*/logs/*.out"))
        )

    def wait_for(condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, logs()
            time.sleep(0.1)

    idle.ok(*hpctrain, "pipeline", "--yes", cwd=tmp_path)
    wait_for(lambda: (checkpoints / "latest").exists())
    idle.ok("scancel", "--signal=KILL", links("begin")[0]["job_id"])
    wait_for(lambda: [end["link"] for end in links("end")][-1:] == [2])

    first, second = links("begin")
    assert (first["mode"], second["mode"]) == ("scratch", "resume")
    assert second["iteration"] % 50 == 0 and 50 <= second["iteration"] < 200
    assert (
        links("end")[-1]["exit_code"] == 0
        and (checkpoints / "latest").read_text() == "global_step200"
    ), logs()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["link"] for line in metrics} == {1, 2} and metrics[-1]["loss"] < metrics[0][
        "loss"
    ] / 2
    # what `hpctrain export` would make of it: tests/promises/train
    left = weights(tmp_path / "models" / "ft")
    assert (tmp_path / "models" / "ft" / "tokenizer.json").is_file()

    wait_for(lambda: links("end", "dpo"))
    said = logs()
    assert links("end", "dpo")[0]["exit_code"] == 0, said
    assert f"stage `sft` hands over the model `{tmp_path}/models/ft`" in said
    assert f"starts from the policy model `{tmp_path}/models/ft`" in said
    pref = weights(tmp_path / "models" / "pref" / "dpo_model")
    moved = max(float(np.abs(pref[name] - left[name]).max()) for name in left)
    assert 0 < moved < 1e-5
    first_loss = json.loads((folder.parent / "dpo" / "metrics.jsonl").read_text().splitlines()[0])[
        "loss"
    ]
    assert first_loss == pytest.approx(np.log(2), abs=1e-6)  # the policy is its reference
