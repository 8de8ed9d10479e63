"""The DPO trainer's config: the keys of `config_dpo.yaml` and a few more, as a frozen value or
every problem at once.

Never imports torch, never reads the environment, the clock or the data.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.paths import hub_cache_dir
from hpctrain.config.document import Document, load_yaml
from hpctrain.config.fields import Field
from hpctrain.config.trainers.sft import SftConfig, also, check_numbers, stop_signal_problems

# Values of `model_type`: their logits are `lm_head(last hidden state)` and nothing more, which the
# tests compare for each.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "olmo2", "phi3")
_DATASET = {
    "dataset_name": Field(
        "text",
        "preference pairs: a .jsonl, .json, .parquet or .arrow file, a folder of them, or ORG/NAME"
        " in the offline hub cache",
        required=True,
    ),
    "subset": Field("int", "use only so many pairs, the first ones; for a smoke run", minimum=1),
    "max_len": Field(
        "int",
        "tokens of prompt and reply together; what is longer loses its end",
        default=1024,
        minimum=2,
    ),
    "split": Field("text", "which split, where the dataset has several", default="train"),
}
_TRAINING = {
    "batch_size": Field("int", "pairs per rank and forward pass", default=4, minimum=1),
    "gradient_accumulation_steps": Field(
        "int", "forward passes per optimizer step", default=1, minimum=1
    ),
    "epochs": Field(
        "number", "passes over the data; `max_steps` wins over it", default=1, minimum=0.000001
    ),
    "max_steps": Field("int", "optimizer steps in all", minimum=1),
    "learning_rate": Field("number", "peak learning rate", default=1e-6, minimum=0),
    "min_lr": Field("number", "learning rate at the end of the decay", default=0.0, minimum=0),
    "lr_decay_style": Field(
        "text",
        "shape after the warm-up",
        default="constant",
        choices=("constant", "linear", "cosine"),
    ),
    "warmup_steps": Field("int", "optimizer steps of linear warm-up", default=0, minimum=0),
    "beta": Field(
        "number", "how strongly the policy is held to the reference", default=0.1, minimum=0
    ),
    "loss_type": Field(
        "text",
        "sigmoid sums log-probabilities over a reply, sigmoid_norm takes their mean",
        default="sigmoid",
        choices=("sigmoid", "sigmoid_norm"),
    ),
    "label_smoothing": Field(
        "number",
        "assumed share of labels that are the wrong way round",
        default=0.0,
        minimum=0,
        maximum=0.4999,
    ),
    "weight_decay": Field(
        "number", "AdamW weight decay of matrices; vectors get none", default=0.0, minimum=0
    ),
    "adam_beta1": Field("number", "AdamW beta1", default=0.9, minimum=0, maximum=0.999999),
    "adam_beta2": Field("number", "AdamW beta2", default=0.999, minimum=0, maximum=0.99999999),
    "adam_eps": Field("number", "AdamW epsilon", default=1e-8, minimum=1e-30),
    "gradient_clipping": Field(
        "number", "largest gradient norm; 0 for none", default=1.0, minimum=0
    ),
    "fsdp": Field(
        "bool",
        "shard weights, gradients and optimizer over all ranks (FSDP2); false keeps a whole copy on"
        " each",
        default=False,
    ),
    "activation_checkpointing": Field(
        "bool", "recompute activations in the backward pass to save memory", default=False
    ),
    "share_prompt": Field(
        "text",
        "compute a pair's prompt once for both replies; auto where the attention allows it and it"
        " pays",
        default="auto",
        choices=("auto", "always", "never"),
    ),
    "attention": Field(
        "text",
        "auto takes flash_attention_2 where it is installed, else sdpa",
        default="auto",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    ),
    "log_steps": Field(
        "int", "optimizer steps between log lines and margin files", default=10, minimum=1
    ),
    "save_steps": Field("int", "optimizer steps between checkpoints", default=100, minimum=1),
    "keep_last_n_checkpoints": Field(
        "int", "how many of this run's checkpoints to keep; absent keeps all", minimum=2
    ),
    "reference_cache": Field(
        "path", "folder of cached reference log-probabilities (default: the checkpoint folder)"
    ),
    "seed": Field("int", "of the data order", default=1234, minimum=0, maximum=2**31 - 1),
    "stop_signal": Field(
        "text",
        "the signal that means: save and exit 0 at the next step",
        default="USR1",
        pattern="(SIG)?[A-Z0-9]+",
        shape="the name of a signal",
    ),
    "max_skipped_in_a_row": Field(
        "int", "stop after so many steps in a row without a finite gradient", default=10, minimum=1
    ),
    "distributed_timeout_s": Field(
        "int", "how long a rank waits for the others", default=1800, minimum=30
    ),
}
FIELDS: dict[str, Field] = {
    "policy_name": Field(
        "text",
        "the model to train: a Hugging Face directory, or ORG/NAME in the offline hub cache",
        required=True,
    ),
    "ref_name": Field(
        "text", "the model it is held to (default: the policy as it was before training)"
    ),
    "precision": Field(
        "text",
        "of weights and activations; optimizer and gradient sums are always fp32",
        default="bf16",
        choices=("bf16", "fp32"),
    ),
    "dataset": Field("table", "the preference pairs", required=True, fields=_DATASET),
    "dpo_training": Field("table", "the training", fields=_TRAINING),
    "mount_dir": Field(
        "path", "where `dpo_model` and a copy of `logs` go (default: the run directory)"
    ),
    "wandb_project": Field(
        "text", "Weights & Biases project; offline unless WANDB_MODE says otherwise"
    ),
}
SOURCES = (("policy_name",), ("ref_name",), ("dataset", "dataset_name"))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class DpoConfig:
    """A valid config. `dataset` and `training` have the keys of FIELDS; sources are absolute paths
    or hub ids."""

    policy_name: str
    ref_name: str | None
    precision: str
    dataset: Mapping[str, Any]
    training: Mapping[str, Any]
    mount_dir: str | None
    wandb_project: str | None

    @property
    def stop_signal_number(self) -> int:
        return int(signal.Signals["SIG" + self.training["stop_signal"].removeprefix("SIG")])

    @property
    def schedule(self) -> SftConfig:
        """The learning rate's part in the words of `hpctrain.config.trainers.sft.learning_rate`."""
        values = self.training
        return SftConfig(
            lr=values["learning_rate"],
            min_lr=values["min_lr"],
            lr_decay_style=values["lr_decay_style"],
            warmup_iters=values["warmup_steps"],
        )

    def train_batch_size(self, num_ranks: int) -> int:
        """Pairs per optimizer step over all ranks."""
        return int(
            self.training["batch_size"] * self.training["gradient_accumulation_steps"] * num_ranks
        )

    def as_dict(self) -> dict[str, Any]:
        """The config in the nesting of its file."""
        return {
            "policy_name": self.policy_name,
            "ref_name": self.ref_name,
            "precision": self.precision,
            "dataset": dict(self.dataset),
            "dpo_training": dict(self.training),
            "mount_dir": self.mount_dir,
            "wandb_project": self.wandb_project,
        }


def load_config(path: str) -> DpoConfig:
    """The config of a YAML file, with its sources found on this machine.

    Raises UsageError with every unknown key, wrong type, broken rule and missing source, each with
    file:line:column; EnvironmentFault when the file cannot be read.
    """
    document = load_yaml(path)
    base_dir = os.path.dirname(os.path.abspath(path))
    config, problems = parse_config(document, base_dir)
    found: dict[tuple[str, ...], str | None] = {}
    for key in SOURCES:
        name = config.dataset["dataset_name"] if len(key) == 2 else getattr(config, key[0])
        if not name or any(problem.where == document.where(*key) for problem in problems):
            continue
        found[key] = find_source(name, base_dir, "datasets" if len(key) == 2 else "models")
        if found[key] is None:
            problems.append(_not_found(name, key, document))
        elif len(key) == 1 and not os.path.isfile(os.path.join(str(found[key]), "config.json")):
            problems.append(
                Problem(
                    f"`{found[key]}` has no config.json",
                    where=document.where(*key),
                    hint="name the Hugging Face directory of a model",
                )
            )
    if problems:
        raise UsageError(problems)
    return DpoConfig(
        str(found["policy_name",]),
        found.get(("ref_name",)),
        config.precision,
        {**config.dataset, "dataset_name": found["dataset", "dataset_name"]},
        config.training,
        config.mount_dir,
        config.wandb_project,
    )


def parse_config(document: Document, base_dir: str) -> tuple[DpoConfig, list[Problem]]:
    """The config of a YAML document and every problem of it; looks at no file.

    With problems it is a best guess, good for finding more of them. Relative paths are relative to
    `base_dir`.
    """
    values, problems = check_numbers(document, FIELDS)
    nested = {
        f"unknown key `{key}`": f"{table}.{key}"
        for table in ("dpo_training", "dataset")
        for key in FIELDS[table].fields or {}
    }
    problems = [
        replace(found, hint=f"it is `{nested[found.what]}`") if found.what in nested else found
        for found in problems
    ]
    dataset = values.get("dataset") or {key: field.default for key, field in _DATASET.items()}
    training = values.get("dpo_training") or {
        key: field.default for key, field in _TRAINING.items()
    }
    dataset["dataset_name"] = absolute_source(dataset.get("dataset_name") or "", base_dir)
    if training.get("reference_cache"):
        training["reference_cache"] = _absolute(training["reference_cache"], base_dir)
    config = DpoConfig(
        absolute_source(values.get("policy_name") or "", base_dir),
        absolute_source(values["ref_name"], base_dir) if values.get("ref_name") else None,
        values.get("precision") or "bf16",
        dataset,
        training,
        _absolute(values["mount_dir"], base_dir) if values.get("mount_dir") else None,
        values.get("wandb_project"),
    )
    return config, also(problems, _contradictions(config, document))


def absolute_source(name: str, base_dir: str) -> str:
    """`name` as an absolute path, unless it has the form ORG/NAME: that may be a hub id and is left
    as it is."""
    return name if not name or _HUB_ID.fullmatch(name) else _absolute(name, base_dir)


def find_source(name: str, base_dir: str, kind: str) -> str | None:
    """The path of a source on this machine: a path, one relative to `base_dir`, or a snapshot in
    the hub cache.

    The cache is laid out as huggingface_hub does:
    `hub/<kind>--ORG--NAME/{refs/main,snapshots/<commit>/}`.
    """
    path = os.path.join(base_dir, name)
    if os.path.exists(path):
        return path
    if not _HUB_ID.fullmatch(name):
        return None
    hub = hub_cache_dir()
    folder = os.path.join(hub, f"{kind}--{name.replace('/', '--')}")
    try:
        with open(os.path.join(folder, "refs", "main"), encoding="utf-8") as file:
            snapshot = os.path.join(folder, "snapshots", file.read().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return snapshot if os.path.isdir(snapshot) else None


def _absolute(path: str, base_dir: str) -> str:
    return os.path.normpath(os.path.join(base_dir, os.path.expanduser(path)))


def _not_found(name: str, key: tuple[str, ...], document: Document) -> Problem:
    hint = ""
    if _HUB_ID.fullmatch(name):
        hint = (
            f"download it before the job (`hf download {name}`), since jobs fetch nothing, or give"
            " a path"
        )
    return Problem(f"`{name}` does not exist here", where=document.where(*key), hint=hint)


def _contradictions(config: DpoConfig, document: Document) -> list[Problem]:
    """Keys that are valid alone and wrong together."""
    found = []
    values = config.training

    def add(key: str, what: str, hint: str = "") -> None:
        found.append(Problem(what, where=document.where("dpo_training", key), hint=hint))

    if values["min_lr"] > values["learning_rate"]:
        add(
            "min_lr",
            f"`min_lr: {values['min_lr']}` is above `learning_rate: {values['learning_rate']}`",
        )
    if values["max_steps"] and values["warmup_steps"] > values["max_steps"]:
        add(
            "warmup_steps",
            f"`warmup_steps: {values['warmup_steps']}` is above `max_steps: {values['max_steps']}`",
        )
    if values["beta"] == 0:
        add("beta", "`beta: 0` gives a loss that nothing can lower", "0.1 is usual")
    if values["share_prompt"] == "always" and values["attention"] == "flash_attention_2":
        add(
            "share_prompt",
            "`share_prompt: always` needs a mask that flash_attention_2 cannot take",
            "delete one of them",
        )
    where = document.where("dpo_training", "stop_signal")
    return found + stop_signal_problems(values["stop_signal"], where)
