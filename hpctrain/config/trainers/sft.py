"""The trainer's config: one flat YAML file, named by HPCTRAIN_CONFIG, that becomes a frozen value
or every problem at once.

Keys that GPT-NeoX has too keep its names and meanings. Never reads the environment, the clock or
the data.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.document import Document, load_yaml, looks_like_float
from hpctrain.config.fields import countable


def _key(default: Any, doc: str, **rules: Any) -> Any:
    """A config key: its default, one sentence, and rules among `choices`, `least`, `most`,
    `above`."""
    return field(default=default, metadata={"doc": doc, **rules})


@dataclass(frozen=True)
class SftConfig:
    """What `hpctrain.train.sft` trains. Paths are absolute once parsed (relative ones are relative
    to the file)."""

    model: str = _key("", "Hugging Face directory, or a config.json for random weights")
    train_data_paths: tuple[str, ...] = _key((), "prefixes of indexed datasets, without .bin")
    seq_length: int = _key(2048, "tokens the model sees per row; rows hold one more", least=2)
    train_iters: int | None = _key(None, "optimizer steps in all; or give train_epochs", least=1)
    train_epochs: float | None = _key(None, "passes over the data; or give train_iters", above=0)
    init: str = _key(
        "auto",
        "weights of a fresh start: auto takes the directory's when it has any",
        choices=("auto", "random", "pretrained"),
    )
    tokenizer: str | None = _key(
        None, "SentencePiece model; kept in each checkpoint for export and generate"
    )

    train_micro_batch_size_per_gpu: int = _key(1, "rows per rank and forward pass", least=1)
    gradient_accumulation_steps: int | None = _key(
        None, "forward passes per step; derived when absent", least=1
    )
    train_batch_size: int | None = _key(
        None, "rows per step over all ranks; derived when absent", least=1
    )

    pack_impl: str = _key(
        "k_bin_packed",
        "best fit of whole documents, or one document a row",
        choices=("k_bin_packed", "unpacked"),
    )
    loss_mask_pairs: tuple[int, ...] = _key(
        (), "flat list open, close, …: untrained from open to close, both included"
    )
    loss_mask_alternating_individual: tuple[int, ...] = _key(
        (), "ids whose 1st, 3rd, … occurrence is untrained"
    )
    loss_mask_individual: tuple[int, ...] = _key((), "ids that are never trained")
    eod_mask_loss: bool = _key(
        False, "whether the token after an end of document is untrained; needs eod_id"
    )
    eod_id: int | None = _key(None, "the end-of-document token", least=0)

    precision: str = _key(
        "bf16", "of weights and activations; the optimizer is always fp32", choices=("bf16", "fp32")
    )
    zero_stage: int = _key(1, "DeepSpeed ZeRO stage", least=0, most=3)
    attention: str = _key(
        "auto",
        "auto takes flash_attention_2 where it is installed, else sdpa",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    activation_checkpointing: bool = _key(
        False, "recompute activations in the backward pass to save memory"
    )

    lr: float = _key(1e-5, "peak learning rate", least=0)
    min_lr: float = _key(0.0, "learning rate at the end of the decay", least=0)
    lr_decay_style: str = _key(
        "cosine", "shape after the warm-up", choices=("cosine", "linear", "constant")
    )
    lr_decay_iters: int | None = _key(
        None, "iteration where the decay ends; train_iters when absent", least=1
    )
    warmup_iters: int = _key(0, "iterations of linear warm-up", least=0)
    weight_decay: float = _key(0.0, "AdamW weight decay of matrices; vectors get none", least=0)
    adam_beta1: float = _key(0.9, "AdamW beta1", least=0, most=1)
    adam_beta2: float = _key(0.95, "AdamW beta2", least=0, most=1)
    adam_eps: float = _key(1e-8, "AdamW epsilon", above=0)
    gradient_clipping: float = _key(1.0, "largest gradient norm; 0 for none", least=0)
    seed: int = _key(1234, "of initial weights, data order and dropout", least=0, most=2**31 - 1)

    checkpoint_factor: int = _key(100, "iterations between checkpoints", least=1)
    keep_last_n_checkpoints: int | None = _key(
        None, "how many of this run's checkpoints to keep; absent keeps all", least=2
    )
    export_dir: str | None = _key(
        None, "Hugging Face directory that the finished run leaves, which a pipeline hands on"
    )
    stop_signal: str = _key("USR1", "the signal that means: save and exit 0 at the next step")
    log_interval: int = _key(10, "iterations between log lines", least=1)
    max_skipped_in_a_row: int = _key(
        10, "stop after so many steps in a row without a finite gradient", least=1
    )
    wandb_project: str | None = _key(
        None, "Weights & Biases project; offline unless WANDB_MODE says otherwise"
    )
    distributed_timeout_s: int = _key(1800, "how long a rank waits for the others", least=30)

    @property
    def stop_signal_number(self) -> int:
        return int(signal.Signals["SIG" + self.stop_signal.removeprefix("SIG")])


def is_stop_signal(name: str) -> bool:
    """Whether it is the name of a signal that can ask a process to stop: no process hears KILL and
    STOP."""
    bare = name.removeprefix("SIG")
    return "SIG" + bare in signal.Signals.__members__ and bare not in ("KILL", "STOP")


def load_config(path: str) -> SftConfig:
    """The config of a YAML file.

    Raises UsageError with every unknown key, wrong type, broken rule and missing file, each with
    file:line:column; EnvironmentFault when the file cannot be read.
    """
    document = load_yaml(path)
    config, problems = parse_config(document, os.path.dirname(os.path.abspath(path)))
    bad = {problem.where for problem in problems}
    problems += [
        problem for problem in _missing_files(config, document) if problem.where not in bad
    ]
    if problems:
        raise UsageError(problems)
    return config


def parse_config(document: Document, base_dir: str) -> tuple[SftConfig, list[Problem]]:
    """The config of a YAML document and every problem of it; looks at no file.

    With problems it is a best guess, good for finding more of them. Relative paths are relative to
    `base_dir`.
    """
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        return SftConfig(), [Problem("the config is not a mapping of keys", where=document.where())]
    problems: list[Problem] = []
    fields = {item.name: item for item in dataclasses.fields(SftConfig)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else ""
            problems.append(
                Problem(f"unknown key `{key}`", where=document.where_key(key), hint=hint)
            )
            continue
        try:
            values[key] = _convert(value, fields[key])
        except ValueError as error:
            what = f"`{key}: {_show(value)}` {error}"
            problems.append(
                Problem(what, document.where(key), why=f"{key}: {fields[key].metadata['doc']}")
            )
    for key in ("model", "tokenizer", "export_dir"):
        if values.get(key):
            values[key] = os.path.join(base_dir, os.path.expanduser(values[key]))
    if "train_data_paths" in values:
        values["train_data_paths"] = tuple(
            os.path.join(base_dir, prefix) for prefix in values["train_data_paths"]
        )
    bad = {problem.where for problem in problems}
    config = dataclasses.replace(SftConfig(), **values)
    problems += [
        problem
        for problem in _contradictions(config, document, set(data))
        if problem.where not in bad
    ]
    return config, problems


@dataclass(frozen=True)
class Batch:
    """The batch arithmetic: `train_batch_size == micro * accumulation * ranks`."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def train_batch_size(self) -> int:
        return self.micro * self.accumulation * self.ranks


def resolve_batch(config: SftConfig, num_ranks: int, where: str = "") -> Batch:
    """The whole batch for so many ranks, deriving what the config leaves out. Raises UsageError
    when it cannot hold."""
    micro, gas, total = (
        config.train_micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
        config.train_batch_size,
    )
    if gas is None:
        gas = 1 if total is None else total // (micro * num_ranks)
    batch = Batch(micro, max(gas, 1), num_ranks)
    if total is not None and batch.train_batch_size != total:
        step = micro * num_ranks
        raise UsageError(
            f"`train_batch_size: {total}` cannot be had with {num_ranks} ranks",
            where=where,
            why=(
                f"micro batch {micro} x accumulation {batch.accumulation} x {num_ranks} ranks"
                f" = {batch.train_batch_size}"
            ),
            hint=f"use a multiple of {step}, such as {max(step, round(total / step) * step)}",
        )
    return batch


def learning_rate(config: SftConfig, iteration: int, train_iters: int) -> float:
    """The learning rate of step `iteration` (from 1): linear warm-up, then decay from lr to min_lr.

    A pure function of the iteration, so that a resumed run needs no scheduler state.
    """
    if iteration <= config.warmup_iters:
        return config.lr * iteration / config.warmup_iters
    end = config.lr_decay_iters or train_iters
    if config.lr_decay_style == "constant":
        return config.lr
    # Counted such that the first step after the warm-up has lr and the last one does not waste
    # itself on min_lr 0.
    done = min(1.0, (iteration - 1 - config.warmup_iters) / max(1, end - config.warmup_iters))
    share = 1 - done if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * share


def _convert(value: Any, item: Any) -> Any:
    """`value` as the field's type. Raises ValueError with a clause that continues '`key: value`
    …'."""
    kind, rules = item.type, item.metadata
    if value is None:
        if "None" in kind:
            return None
        raise ValueError("has no value")
    if kind.startswith("tuple"):
        value = value if isinstance(value, list) else [value]
        wanted = int if "int" in kind else str
        if any(not isinstance(child, wanted) or isinstance(child, bool) for child in value):
            raise ValueError(f"is not a list of {'token ids' if wanted is int else 'paths'}")
        if wanted is int and min(value, default=0) < 0:
            raise ValueError("has a negative token id")
        return tuple(value)
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise ValueError("is not true or false")
        return value
    if kind.startswith("str"):
        if item.name == "precision" and value == "bfloat16":
            value = "bf16"  # NeoX's name for it
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError("is not text")
        if "choices" in rules and value not in rules["choices"]:
            raise ValueError(f"is none of {', '.join(rules['choices'])}")
        if item.name == "stop_signal" and not is_stop_signal(value):
            raise ValueError("is not the name of a signal that a process can hear, such as USR1")
        return value
    if kind.startswith("float") and looks_like_float(value):
        value = float(value)  # YAML 1.1 reads 8e-6 as text
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not countable(value):
        raise ValueError("is not a number")
    if kind.startswith("int") and not isinstance(value, int):
        raise ValueError("is not a whole number")
    if "least" in rules and value < rules["least"]:
        raise ValueError(f"is below {rules['least']}")
    if "most" in rules and value > rules["most"]:
        raise ValueError(f"is above {rules['most']}")
    if "above" in rules and value <= rules["above"]:
        raise ValueError(f"is not above {rules['above']}")
    return float(value) if kind.startswith("float") else value


def _contradictions(config: SftConfig, document: Document, given: set[str]) -> list[Problem]:
    """Keys that are valid alone and wrong together."""
    found = []

    def add(key: str, what: str, hint: str = "") -> None:
        found.append(Problem(what, where=document.where(key), hint=hint))

    for key in ("model", "train_data_paths"):
        if key not in given:
            add(key, f"`{key}` is missing", SftConfig.__dataclass_fields__[key].metadata["doc"])
    if (config.train_iters is None) == (config.train_epochs is None) and not given >= {
        "train_iters",
        "train_epochs",
    }:
        add("train_iters", "neither `train_iters` nor `train_epochs` says when to stop")
    elif given >= {"train_iters", "train_epochs"} and None not in (
        config.train_iters,
        config.train_epochs,
    ):
        add(
            "train_epochs",
            "both `train_iters` and `train_epochs` say when to stop",
            "delete one of them",
        )
    if len(config.loss_mask_pairs) % 2:
        add(
            "loss_mask_pairs",
            f"`loss_mask_pairs` has {len(config.loss_mask_pairs)} ids",
            "it is a flat list of open, close, open, close, …, such as [7, 7]",
        )
    if config.eod_mask_loss and config.eod_id is None:
        add(
            "eod_mask_loss",
            "`eod_mask_loss` needs `eod_id`",
            "give the id of the end-of-document token",
        )
    if config.min_lr > config.lr:
        add("min_lr", f"`min_lr: {config.min_lr}` is above `lr: {config.lr}`")
    if config.train_iters and config.warmup_iters > config.train_iters:
        add(
            "warmup_iters",
            f"`warmup_iters: {config.warmup_iters}` is above `train_iters: {config.train_iters}`",
        )
    if config.lr_decay_iters and config.lr_decay_iters < config.warmup_iters:
        add("lr_decay_iters", "the decay ends before the warm-up does")
    return found


def _missing_files(config: SftConfig, document: Document) -> list[Problem]:
    found = []
    if config.model:
        path = (
            os.path.join(config.model, "config.json")
            if os.path.isdir(config.model)
            else config.model
        )
        if not os.path.isfile(path):
            found.append(
                Problem(
                    f"`{path}` does not exist",
                    document.where("model"),
                    hint="a Hugging Face directory, or the path of a config.json",
                )
            )
    if config.tokenizer and not os.path.isfile(config.tokenizer):
        found.append(
            Problem(f"`{config.tokenizer}` does not exist", where=document.where("tokenizer"))
        )
    for number, prefix in enumerate(config.train_data_paths):
        gone = [
            f"`{prefix}{ending}`"
            for ending in (".bin", ".idx")
            if not os.path.isfile(prefix + ending)
        ]
        if gone:
            hint = f"give the prefix `{prefix[:-4]}`" if prefix.endswith((".bin", ".idx")) else ""
            what = f"{' and '.join(gone)} {'do' if gone[1:] else 'does'} not exist"
            found.append(Problem(what, where=document.where("train_data_paths", number), hint=hint))
    return found


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
