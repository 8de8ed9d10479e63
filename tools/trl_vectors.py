"""Writes tests/data/dpo/trl.json: what TRL's own DPOTrainer computes for the tiny models of
tests/promises/dpo/tiny.py.

TRL is not a dependency of the tests (it brings datasets, pandas and accelerate), so its answers are
kept. To make them again:

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 && /tmp/trl/bin/python tools/trl_vectors.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_MODE="disabled", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
)
TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP / "tests" / "promises" / "dpo"))

import tiny  # noqa: E402

LOSSES = [
    {"loss_type": "sigmoid", "beta": 0.1},
    {"loss_type": "sigmoid", "beta": 0.5},
    {"loss_type": "sigmoid_norm", "beta": 2.0},
]


def main() -> None:
    import datasets
    import torch
    import transformers
    import trl

    datasets.disable_progress_bars()
    answer: dict[str, Any] = {
        "made_with": {
            module.__name__: module.__version__ for module in (trl, transformers, torch, datasets)
        },
        "max_len": 32,
        "batches": [],
        "trained": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        policy, other = (
            tiny.write_model(Path(folder, "policy")),
            tiny.write_model(Path(folder, "other"), seed=1),
        )
        for shape, rows in (("text", tiny.text_rows(6, 3)), ("messages", tiny.message_rows(6, 3))):
            for keys in LOSSES:
                trainer = make(folder, policy, other, rows, max_steps=1, **keys)
                tokens = [
                    {name: row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")}
                    for row in trainer.train_dataset
                ]
                batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
                with torch.no_grad():
                    loss = trainer.compute_loss(trainer.model, batch).item()
                    chosen, rejected = (
                        x.tolist() for x in trainer.compute_ref_log_probs(trainer.model, batch)
                    )
                    ref = [
                        x.tolist() for x in trainer.compute_ref_log_probs(trainer.ref_model, batch)
                    ]
                answer["batches"].append(
                    {
                        "shape": shape,
                        **keys,
                        "tokens": tokens,
                        "loss": loss,
                        "chosen": chosen,
                        "rejected": rejected,
                        "ref_chosen": ref[0],
                        "ref_rejected": ref[1],
                    }
                )
        for keys in LOSSES:
            trainer = make(folder, policy, policy, tiny.text_rows(4, 5), max_steps=5, **keys)
            trainer.train()
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            answer["trained"].append(
                {
                    **keys,
                    "losses": [entry["loss"] for entry in logs],
                    "grad_norms": [entry["grad_norm"] for entry in logs],
                    "margins": [entry["rewards/margins"] for entry in logs],
                }
            )
    target = TOP / "tests" / "data" / "dpo" / "trl.json"
    target.write_text(json.dumps(answer).replace("}, {", "},\n {") + "\n")
    print(target)


def make(
    folder: str, policy: Path, ref: Path, rows: list[dict[str, Any]], max_steps: int, **keys: Any
) -> Any:
    """A DPOTrainer over all rows as one batch, without dropout and with a constant learning
    rate."""
    import datasets
    import transformers
    import trl

    models = [
        transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype="float32", attention_dropout=0.0
        )
        for path in (policy, ref)
    ]
    settings = trl.DPOConfig(
        output_dir=f"{folder}/out",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=32,
        report_to="none",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(rows),
        max_steps=max_steps,
        logging_steps=1,
        save_strategy="no",
        seed=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        disable_tqdm=True,
        **keys,
    )
    return trl.DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(policy),
    )


if __name__ == "__main__":
    main()
