"""Tiny models and preference pairs that are the same bytes everywhere; tools/trl_vectors uses them
too.

Nothing here needs torch: weights come from numpy's frozen RandomState, the tokenizer from
tests/data/dpo.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parents[2] / "data" / "dpo"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WORDS = (
    "river stone quiet engine paper morning copper signal garden window seven slowly under bright"
    " harbour".split()
)


def write_model(folder: Path, seed: int = 0, scale: float = 0.3, **changes: Any) -> Path:
    """A Llama directory with a tokenizer, its weights drawn from `seed`."""
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (kv, hidden),
            at + "self_attn.v_proj.weight": (kv, hidden),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    rng = np.random.RandomState(seed)
    weights = {
        name: (
            np.ones(shape, np.float32)
            if len(shape) == 1
            else (rng.standard_normal(shape) * scale).astype(np.float32)
        )
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, str(folder / "model.safetensors"), {"format": "pt"})
    return folder


def sentence(rng: np.random.RandomState, low: int, high: int) -> str:
    return " ".join(WORDS[int(n)] for n in rng.randint(0, len(WORDS), int(rng.randint(low, high))))


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """prompt, chosen, rejected as text; the chosen reply repeats the prompt, which a model can
    learn."""
    rng = np.random.RandomState(seed)
    out = []
    for _ in range(count):
        prompt = sentence(rng, 3, 9)
        out.append(
            {"prompt": prompt + ":", "chosen": " " + prompt, "rejected": " " + sentence(rng, 2, 7)}
        )
    return out


def message_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as messages, without a prompt column: the replies begin alike."""
    out = []
    for row in text_rows(count, seed):
        head = [{"role": "system", "content": "repeat"}, {"role": "user", "content": row["prompt"]}]
        out.append(
            {
                name: [*head, {"role": "assistant", "content": row[name]}]
                for name in ("chosen", "rejected")
            }
        )
    return out


def orca_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The shape of Intel/orca_dpo_pairs."""
    return [
        {
            "system": "repeat",
            "question": row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in text_rows(count, seed)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
