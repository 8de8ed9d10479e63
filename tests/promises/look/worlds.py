"""A run of each recipe with everything it needs lying here, so that a test can spoil one thing."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tokenize_help import dialogues, model_path
from tokenize_runs import do, request

SITE = {
    "name": "here",
    "title": "this machine",
    "docs_url": "https://example.org",
    "maintainers": ["us"],
    "verified": {"date": "2026-01-01", "by": "us", "evidence": "none"},
    "match": {"hostnames": [".*"]},
    "slurm": {"gpu_request": "gres"},
    "node_types": {
        "g": {
            "sockets": 1,
            "cores": 64,
            "threads_per_core": 1,
            "memory_gib": 480,
            "gpus": 8,
            "gpu_type": "x",
            "gpu_memory_gib": 64,
            "tmp": {"path": "/tmp", "kind": "disk"},
        }
    },
    "partitions": {"main": {"node_type": "g", "max_nodes": 1024, "max_time": "3-00:00:00"}},
}
INSTALLED = (
    "torch transformers numpy deepspeed trl peft accelerate datasets pyarrow sentencepiece"
    " setuptools ray vllm hydra-core tensordict torchdata verl flash-attn beaker-py ai2-olmo-core"
)
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
TALK = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]


class World:
    """The files of a run below `folder`, and its run.yaml as a mapping to change; without a recipe
    only what makes files."""

    def __init__(self, folder: Path, recipe: str = "") -> None:
        self.folder = folder
        if not recipe:
            return
        self.run: dict[str, Any] = {
            "name": "r",
            "site": "./site.yaml",
            "recipe": recipe,
            "partition": "main",
            "nodes": 1,
            "time": "2h",
            "checkpoint": {"dir": "ckpt"},
        }
        self.write("site.yaml", yaml.safe_dump(copy.deepcopy(SITE)))
        self.environment(INSTALLED)
        getattr(self, recipe.replace("-", "_"))()

    # What each recipe needs.

    def command(self) -> None:
        self.write("code/train.py", "import torch\n")
        self.write("code/pkg/main.py", "")
        self.write("after.sh", "#!/bin/sh\n")
        self.run |= {
            "recipe_options": {"argv": ["python3", "-u", "train.py"], "workdir": "code"},
            "chain": {"jobs": 1, "after_each": "after.sh"},
        }

    def neox_sft(self) -> None:
        self.tokenized()
        for name in ("train.py", "deepy.py", "megatron/__init__.py"):
            self.write(f"neox/{name}", "")
        self.run |= {
            "data": {
                split: [f"data/{name}_text_document"]
                for split, name in (("train", "sft"), ("valid", "held"), ("test", "held"))
            },
            "recipe_options": {"dir": "neox", "python": self.python},
            "config": {
                "num_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "seq_length": 512,
                "max_position_embeddings": 512,
                "tokenizer_type": "SPMTokenizer",
                "vocab_file": str(self.folder / "tok.model"),
                "train_micro_batch_size_per_gpu": 1,
                "train_iters": 10,
                "checkpoint_factor": 5,
                "precision": "bfloat16",
                "zero_optimization": {"stage": 1},
                "optimizer": {"type": "Adam", "params": {"lr": 8.0e-6}},
                "loss_mask_pairs": [7, 7],
                "loss_mask_alternating_individual": [8],
            },
        }

    def sft(self) -> None:
        self.tokenized()
        self.model("model")
        self.run |= {
            "data": {"train": ["data/sft_text_document"]},
            "recipe_options": {"model": "model", "tokenizer": "tok.model", "python": self.python},
            "config": {
                "seq_length": 512,
                "train_iters": 10,
                "train_micro_batch_size_per_gpu": 1,
                "init": "pretrained",
                "loss_mask_pairs": [7, 7],
                "loss_mask_alternating_individual": [8],
                "attention": "sdpa",
            },
        }

    def hf_sft(self) -> None:
        self.model("base", template=True)
        self.rows("rows.jsonl", [{"messages": TALK}] * 40)
        self.run |= {
            "data": {"train": ["rows.jsonl"]},
            "recipe_options": {"python": self.python},
            "config": {
                "model_name": "./base",
                "dataset_rows": 40,
                "num_train_epochs": 3,
                "max_length": 1024,
                "lora": {"r": 16},
                "attention": "sdpa",
            },
        }

    def dpo(self) -> None:
        self.model("policy", template=True)
        pair = {"prompt": "what", "chosen": "that", "rejected": "this"}
        self.rows("pairs.jsonl", [pair] * 40)
        self.run |= {
            "data": {"train": ["pairs.jsonl"]},
            "recipe_options": {"python": self.python},
            "config": {
                "policy_name": "./policy",
                "dataset": {"max_len": 512},
                "dpo_training": {"max_steps": 30, "attention": "sdpa"},
            },
        }

    def verl_gad(self) -> None:
        self.model("student", template=True, positions=32768)
        row = {"content": TALK[:1], "teacher_response": "that"}
        for name in ("train", "val"):
            self.parquet(f"{name}.parquet", [row] * 1000)
        self.git("verl", "warmup")
        self.run |= {
            "data": {"train": ["train.parquet"], "valid": ["val.parquet"]},
            "recipe_options": {
                "stage": "warmup",
                "size": "3B",
                "verl": "verl",
                "model": "student",
                "python": self.python,
                "records": 1000,
            },
        }

    def open_instruct_sft(self) -> None:
        self.model("base", template=True)
        self.rows("rows.jsonl", [{"messages": TALK}] * 40)
        commit = self.git("oi", "main")
        self.write("oi/open_instruct/finetune.py", "")
        self.write("oi/open_instruct/dpo_tune_cache.py", "")
        (self.folder / "hf").mkdir()
        self.run |= {
            "data": {"train": ["rows.jsonl"]},
            "recipe_options": {
                "dir": "oi",
                "commit": commit,
                "model": "./base",
                "hf_home": "hf",
                "python": self.python,
            },
            "config": {
                "chat_template_name": "tulu",
                "max_seq_length": 1024,
                "max_train_steps": 100,
                "checkpointing_steps": 50,
            },
        }

    def open_instruct_dpo(self) -> None:
        self.open_instruct_sft()
        self.rows("rows.jsonl", [{"chosen": TALK, "rejected": TALK}] * 40)
        self.run["config"] = {
            "max_seq_length": 1024,
            "max_train_steps": 100,
            "checkpointing_steps": 50,
        }

    # What they are made of.

    @property
    def python(self) -> str:
        return str(self.folder / "env/bin/python")

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def rows(self, name: str, rows: list[Any]) -> None:
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def parquet(self, name: str, rows: list[Any]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), self.folder / name)

    def tokenized(self) -> None:
        shutil.copytree(tokenized_data(), self.folder, dirs_exist_ok=True)

    def model(self, name: str, template: bool = False, positions: int = 4096) -> None:
        """A tiny Llama's folder: a real safetensors file, no torch needed."""
        config = {**TINY_LLAMA, "max_position_embeddings": positions}
        self.write(f"{name}/config.json", json.dumps(config))
        self.weights(f"{name}/model.safetensors", "BF16")
        self.write(f"{name}/tokenizer.json", "{}")
        about = {"chat_template": "{{ messages }}"} if template else {}
        self.write(f"{name}/tokenizer_config.json", json.dumps(about))

    def weights(self, name: str, dtype: str) -> None:
        head = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}}).encode()
        self.write(name, len(head).to_bytes(8, "little") + head + b"\0\0\0\0")

    def environment(self, packages: str) -> None:
        """An environment by its names alone, as `check` sees one."""
        shutil.rmtree(self.folder / "env", ignore_errors=True)
        for name in packages.split():
            (self.folder / f"env/lib/python3.11/site-packages/{name}-1.0.dist-info").mkdir(
                parents=True
            )
        (self.folder / "env/lib/python3.11/site-packages/hpctrain").mkdir()
        self.write("env/pyvenv.cfg", "include-system-site-packages = false\n")
        (self.folder / "env/bin").mkdir()
        os.symlink(sys.executable, self.folder / "env/bin/python")

    def git(self, name: str, branch: str) -> str:
        """A working copy with one commit on that branch; its commit."""
        folder = self.folder / name
        shutil.copytree(git_copy(), folder)
        self.in_git(name, "branch", "-m", branch)
        return self.in_git(name, "rev-parse", "HEAD")

    def in_git(self, name: str, *words: str) -> str:
        done = subprocess.run(
            ["git", "-C", self.folder / name, "-c", "user.name=a", "-c", "user.email=a@b", *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def set(self, key: str, value: Any) -> None:
        """Change a value of run.yaml by its dotted path; None takes it out."""
        *path, last = key.split(".")
        table = self.run
        for part in path:
            table = table.setdefault(part, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value

    def save(self) -> Path:
        return self.write("run.yaml", yaml.safe_dump(self.run, sort_keys=False))


@functools.cache
def tokenized_data() -> Path:
    """Data sets of the real tokenizer: `sft` and `held`, `bare` without end-of-document tokens,
    `other` of another tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix="hpctrain-look-"))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in dialogues(300)))
    data = folder / "data"
    data.mkdir()
    for name, kind, eod in (
        ("sft", "bpe_identity", True),
        ("held", "bpe_identity", True),
        ("bare", "bpe_identity", False),
        ("other", "bpe_nmt_nfkc", True),
    ):
        do(request(data, texts, kind=kind, prefix=name, append_eod=eod))
    for name, kind in (("tok", "bpe_identity"), ("other", "bpe_nmt_nfkc")):
        shutil.copy(model_path(kind), folder / f"{name}.model")
    return folder


@functools.cache
def git_copy() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hpctrain-git-"))
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, "init", "-q"], check=True)
    commit = ["git", "-C", folder, *who, "commit", "-q", "--allow-empty", "-m", "one"]
    subprocess.run(commit, check=True)
    return folder
