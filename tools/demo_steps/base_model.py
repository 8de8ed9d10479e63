"""Pretrains a tiny base model on the plain text of dialogues: the start checkpoint of the demo's
run.

    python tools/demo_steps/base_model.py DIALOGUES.jsonl TOKENIZER.model OUT [--iters 300]

OUT then holds config.json (the model) and checkpoints/global_stepN (what `checkpoint.start` names);
the last line of stdout is the path of that checkpoint. Done already: says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

MARKER = re.compile(r"<<<\|[^|<>]*\|>>>")
SEQ_LENGTH = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dialogues")
    parser.add_argument("tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--iters", type=int, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoints" / f"global_step{args.iters}"
    if (checkpoint / "hpctrain.json").is_file():
        print(f"{checkpoint} is there already", file=sys.stderr)
        print(checkpoint)
        return 0
    vocab_size = write_text(args.dialogues, args.tokenizer, args.out / "text")
    (args.out / "config.json").write_text(json.dumps(llama(vocab_size), indent=1) + "\n")
    config = {
        "model": "config.json",
        "tokenizer": os.path.abspath(args.tokenizer),
        "train_data_paths": ["text"],
        "seq_length": SEQ_LENGTH,
        "train_iters": args.iters,
        "train_micro_batch_size_per_gpu": 8,
        "precision": "fp32",
        "zero_stage": 0,
        "lr": 3.0e-3,
        "min_lr": 3.0e-4,
        "warmup_iters": 20,
        "weight_decay": 0.1,
        "checkpoint_factor": 10**6,
        "log_interval": max(1, args.iters // 6),
    }
    (args.out / "config.yml").write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML
    env = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "HPCTRAIN_MODE": "scratch",
        "HPCTRAIN_CONFIG": str(args.out / "config.yml"),
        "HPCTRAIN_CHECKPOINT_DIR": str(args.out / "checkpoints"),
        "HPCTRAIN_RUN_DIR": str(args.out),
    }
    code = subprocess.run(
        [sys.executable, "-m", "hpctrain.train.sft"], env=env, check=False
    ).returncode
    if code == 0:
        print(checkpoint)
    return code


def llama(vocab_size: int) -> dict[str, object]:
    """About a million parameters: two cores train it at thousands of tokens a second."""
    return {
        "model_type": "llama",
        "vocab_size": -(-vocab_size // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }


def write_text(dialogues: str, tokenizer: str, prefix: Path) -> int:
    """PREFIX.bin and PREFIX.idx of all the text between the markers, a few lines a document;
    returns the vocabulary."""
    import sentencepiece

    from hpctrain.data.dataset.header import dtype_for
    from hpctrain.data.dataset.indexed_dataset import write_index

    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    eod = model.piece_to_id("<|endoftext|>")
    documents: list[list[int]] = []
    current: list[int] = []
    with open(dialogues, encoding="utf-8") as file:
        for line in file:
            text = " ".join(span for span in MARKER.split(json.loads(line)["text"]) if span.strip())
            tokens = model.encode(text)
            if current and len(current) + len(tokens) > SEQ_LENGTH:
                documents.append([*current, eod])
                current = []
            current += tokens[:SEQ_LENGTH]
    documents.append([*current, eod])
    dtype = dtype_for(model.get_piece_size())
    np.concatenate([np.array(document, dtype=dtype) for document in documents]).tofile(
        f"{prefix}.bin"
    )
    sizes = np.array([len(document) for document in documents], dtype=np.int32)
    with open(f"{prefix}.idx", "wb") as index:
        write_index(index, dtype, iter([sizes]), len(sizes))
    return int(model.get_piece_size())


if __name__ == "__main__":
    sys.exit(main())
