"""The trainer's config: one flat YAML file, named by HPCTRAIN_CONFIG, that becomes a frozen value
or every problem at once.

Keys that GPT-NeoX has too keep its names and meanings. Never reads the environment, the clock or
the data.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.document import Document, load_yaml, looks_like_float
from hpctrain.config.fields import Field, check

# The values of `model_type` whose layers the trainer knows.
FAMILIES = ("llama", "gpt_neox")
_TOKEN = Field("int", "a token id", minimum=0)


def _key(kind: str, doc: str, default: Any = None, **rules: Any) -> Any:
    """A config key: a dataclass field that carries its declaration."""
    declared = Field(kind, doc, default=default, **rules)
    return field(default=() if kind == "list" else default, metadata={"field": declared})


@dataclass(frozen=True)
class SftConfig:
    """What `hpctrain.train.sft` trains. Paths are absolute once parsed (relative ones are relative
    to the file)."""

    model: str = _key(
        "path", "Hugging Face directory, or a config.json for random weights", required=True
    )
    train_data_paths: tuple[str, ...] = _key(
        "list",
        "prefixes of indexed datasets, without .bin",
        required=True,
        items=Field("path", "a prefix"),
    )
    seq_length: int = _key(
        "int", "tokens the model sees per row; rows hold one more", 2048, minimum=2
    )
    train_iters: int | None = _key("int", "optimizer steps in all; or give train_epochs", minimum=1)
    train_epochs: float | None = _key(
        "number", "passes over the data; or give train_iters", minimum=1e-6
    )
    init: str = _key(
        "text",
        "weights of a fresh start: auto takes the directory's when it has any",
        "auto",
        choices=("auto", "random", "pretrained"),
    )
    tokenizer: str | None = _key(
        "path", "SentencePiece model; kept in each checkpoint for export and generate"
    )

    train_micro_batch_size_per_gpu: int = _key(
        "int", "rows per rank and forward pass", 1, minimum=1
    )
    gradient_accumulation_steps: int | None = _key(
        "int", "forward passes per step; derived when absent", minimum=1
    )
    train_batch_size: int | None = _key(
        "int", "rows per step over all ranks; derived when absent", minimum=1
    )

    pack_impl: str = _key(
        "text",
        "best fit of whole documents, or one document a row",
        "k_bin_packed",
        choices=("k_bin_packed", "unpacked"),
    )
    loss_mask_pairs: tuple[int, ...] = _key(
        "list",
        "flat list open, close, …: untrained from open to close, both included",
        items=_TOKEN,
    )
    loss_mask_alternating_individual: tuple[int, ...] = _key(
        "list", "ids whose 1st, 3rd, … occurrence is untrained", items=_TOKEN
    )
    loss_mask_individual: tuple[int, ...] = _key("list", "ids that are never trained", items=_TOKEN)
    eod_mask_loss: bool = _key(
        "bool", "whether the token after an end of document is untrained; needs eod_id", False
    )
    eod_id: int | None = _key("int", "the end-of-document token", minimum=0)

    precision: str = _key(
        "text",
        "of weights and activations; the optimizer is always fp32",
        "bf16",
        choices=("bf16", "fp32"),
    )
    zero_stage: int = _key("int", "DeepSpeed ZeRO stage", 1, minimum=0, maximum=3)
    attention: str = _key(
        "text",
        "auto takes flash_attention_2 where it is installed, else sdpa",
        "auto",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    activation_checkpointing: bool = _key(
        "bool", "recompute activations in the backward pass to save memory", False
    )

    lr: float = _key("number", "peak learning rate", 1e-5, minimum=0)
    min_lr: float = _key("number", "learning rate at the end of the decay", 0.0, minimum=0)
    lr_decay_style: str = _key(
        "text", "shape after the warm-up", "cosine", choices=("cosine", "linear", "constant")
    )
    lr_decay_iters: int | None = _key(
        "int", "iteration where the decay ends; train_iters when absent", minimum=1
    )
    warmup_iters: int = _key("int", "iterations of linear warm-up", 0, minimum=0)
    weight_decay: float = _key(
        "number", "AdamW weight decay of matrices; vectors get none", 0.0, minimum=0
    )
    adam_beta1: float = _key("number", "AdamW beta1", 0.9, minimum=0, maximum=1)
    adam_beta2: float = _key("number", "AdamW beta2", 0.95, minimum=0, maximum=1)
    adam_eps: float = _key("number", "AdamW epsilon", 1e-8, minimum=1e-30)
    gradient_clipping: float = _key("number", "largest gradient norm; 0 for none", 1.0, minimum=0)
    seed: int = _key(
        "int", "of initial weights, data order and dropout", 1234, minimum=0, maximum=2**31 - 1
    )

    checkpoint_factor: int = _key("int", "iterations between checkpoints", 100, minimum=1)
    keep_last_n_checkpoints: int | None = _key(
        "int", "how many of this run's checkpoints to keep; absent keeps all", minimum=2
    )
    export_dir: str | None = _key(
        "path", "Hugging Face directory that the finished run leaves, which a pipeline hands on"
    )
    stop_signal: str = _key(
        "text", "the signal that means: save and exit 0 at the next step", "USR1"
    )
    log_interval: int = _key("int", "iterations between log lines", 10, minimum=1)
    max_skipped_in_a_row: int = _key(
        "int", "stop after so many steps in a row without a finite gradient", 10, minimum=1
    )
    wandb_project: str | None = _key(
        "text", "Weights & Biases project; offline unless WANDB_MODE says otherwise"
    )
    distributed_timeout_s: int = _key(
        "int", "how long a rank waits for the others", 1800, minimum=30
    )

    @property
    def stop_signal_number(self) -> int:
        return int(signal.Signals["SIG" + self.stop_signal.removeprefix("SIG")])


def stop_signal_problems(name: str, where: str) -> list[Problem]:
    """One when no signal of that name can ask a process to stop: no process hears KILL and STOP."""
    bare = name.removeprefix("SIG")
    if "SIG" + bare in signal.Signals.__members__ and bare not in ("KILL", "STOP"):
        return []
    what = f"`stop_signal: {name}` is not the name of a signal that a process can hear"
    return [Problem(what, where=where, hint="such as USR1")]


FIELDS: dict[str, Field] = {item.name: item.metadata["field"] for item in fields(SftConfig)}


def load_config(path: str) -> SftConfig:
    """The config of a YAML file.

    Raises UsageError with every unknown key, wrong type, broken rule and missing file, each with
    file:line:column; EnvironmentFault when the file cannot be read.
    """
    document = load_yaml(path)
    config, problems = parse_config(document, os.path.dirname(os.path.abspath(path)))
    problems = also(problems, _missing_files(config, document))
    if problems:
        raise UsageError(problems)
    return config


def parse_config(document: Document, base_dir: str) -> tuple[SftConfig, list[Problem]]:
    """The config of a YAML document and every problem of it; looks at no file.

    With problems it is a best guess, good for finding more of them. Relative paths are relative to
    `base_dir`.
    """
    data = document.data or {}
    values, problems = check(replace(document, data=_as_meant(data)), FIELDS)
    problems += _empty_keys(data, document)
    for key, declared in FIELDS.items():
        if declared.kind == "path" and values.get(key):
            values[key] = _below(base_dir, values[key])
        elif declared.kind == "list":
            values[key] = tuple(item for item in values.get(key) or () if item is not None)
    values["train_data_paths"] = tuple(
        _below(base_dir, prefix) for prefix in values["train_data_paths"]
    )
    config = replace(
        SftConfig(), **{key: value for key, value in values.items() if value is not None}
    )
    given = set(data) if isinstance(data, dict) else set()
    return config, also(problems, _contradictions(config, document, given))


def _empty_keys(data: Any, document: Document) -> list[Problem]:
    """The keys with a default of their own that are given without a value: nobody means that."""
    given = data if isinstance(data, dict) else {}
    empty = [key for key in FIELDS if key in given and given[key] is None]
    hint = "delete the line to take the default, {}"
    return [
        Problem(f"`{key}` has no value", document.where(key), hint=hint.format(FIELDS[key].default))
        for key in empty
        if FIELDS[key].default is not None
    ]


def _below(folder: str, path: str) -> str:
    return os.path.join(folder, os.path.expanduser(path))


def _as_meant(data: Any) -> Any:
    """The data with NeoX's name for bf16, one item where a list is due as a list, and `8e-6` as a
    number."""
    if not isinstance(data, dict):
        return data
    data = read_numbers(data, FIELDS)
    for key, value in data.items():
        if key in FIELDS and FIELDS[key].kind == "list" and isinstance(value, (str, int)):
            data[key] = [value]
    if data.get("precision") == "bfloat16":
        data["precision"] = "bf16"
    return data


def check_numbers(
    document: Document, fields: Mapping[str, Field]
) -> tuple[dict[str, Any], list[Problem]]:
    """`fields.check` of a trainer's config, in which `5e-7` is a number."""
    return check(replace(document, data=read_numbers(document.data or {}, fields)), fields)


def also(problems: list[Problem], more: list[Problem]) -> list[Problem]:
    """The problems, and those of `more` that lie elsewhere: what is wrong already needs no second
    word."""
    bad = {problem.where for problem in problems}
    return problems + [problem for problem in more if problem.where not in bad]


def read_numbers(data: Any, fields: Mapping[str, Field]) -> Any:
    """The data with `5e-7`, which YAML 1.1 reads as text, as the number it means."""
    if not isinstance(data, dict):
        return data
    out = {}
    for key, value in data.items():
        declared = fields.get(key)
        if declared and declared.kind == "table":
            value = read_numbers(value, declared.fields or {})
        elif declared and declared.kind == "number" and looks_like_float(value):
            value = float(value)
        out[key] = value
    return out


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


def _contradictions(config: SftConfig, document: Document, given: set[str]) -> list[Problem]:
    """Keys that are valid alone and wrong together."""
    found = []

    def add(key: str, what: str, hint: str = "") -> None:
        found.append(Problem(what, where=document.where(key), hint=hint))

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
    return found + stop_signal_problems(config.stop_signal, document.where("stop_signal"))


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
