"""The config of an SFT through TRL: the arguments by TRL's own names, as a frozen value or every
problem at once.

Never imports torch or TRL, never reads the environment, the clock or the data.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.document import Document, load_yaml
from hpctrain.config.fields import Field
from hpctrain.config.trainers.dpo import absolute_source, find_source
from hpctrain.config.trainers.sft import also, check_numbers, stop_signal_problems

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LORA = {
    "r": Field("int", "rank of the update", default=16, minimum=1, maximum=4096),
    "alpha": Field("number", "scale of the update is alpha / r", default=32, minimum=0.000001),
    "dropout": Field("number", "dropout before the update", default=0.0, minimum=0, maximum=0.99),
    "target_modules": Field(
        "list",
        "which linear layers get one",
        default=ATTENTION_AND_MLP,
        items=Field("text", "the end of a module's name"),
    ),
}
FIELDS: dict[str, Field] = {
    "model_name": Field(
        "text",
        "the full-precision base: a Hugging Face directory, or ORG/NAME in the offline hub cache",
        required=True,
    ),
    "start": Field(
        "path",
        "what training starts from: an update of the base, or a whole model in its place (run.yaml:"
        " `checkpoint.start`)",
    ),
    "dataset_path": Field(
        "text",
        "dialogues or texts: a .jsonl, .json, .parquet or .arrow file, or a folder of them",
        required=True,
    ),
    "lora": Field(
        "table",
        "train a low-rank update of the base, which `hpctrain export` merges; null trains all"
        " weights",
        fields=_LORA,
        nullable=True,
    ),
    "precision": Field(
        "text",
        "of the base's weights and activations; an update, and its optimizer, is fp32",
        default="bf16",
        choices=("bf16", "fp32"),
    ),
    "num_train_epochs": Field(
        "number", "passes over the data; `max_steps` wins over it", default=3, minimum=0.000001
    ),
    "max_steps": Field("int", "optimizer steps in all", minimum=1),
    "per_device_train_batch_size": Field(
        "int", "rows per rank and forward pass", default=4, minimum=1
    ),
    "gradient_accumulation_steps": Field(
        "int", "forward passes per optimizer step", default=2, minimum=1
    ),
    "max_length": Field(
        "int", "tokens of a row; what is longer loses its end", default=2048, minimum=2
    ),
    "completion_only_loss": Field(
        "bool", "rows with a prompt: train on the completion only (default: yes)"
    ),
    "assistant_only_loss": Field(
        "bool", "rows of messages: train on the assistant's turns only", default=False
    ),
    "learning_rate": Field("number", "peak learning rate", default=2e-4, minimum=0),
    "lr_scheduler_type": Field(
        "text",
        "shape after the warm-up",
        default="cosine",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    ),
    "warmup_steps": Field("int", "optimizer steps of linear warm-up", default=0, minimum=0),
    "weight_decay": Field("number", "AdamW weight decay", default=0.0, minimum=0),
    "max_grad_norm": Field("number", "largest gradient norm; 0 for none", default=1.0, minimum=0),
    "optim": Field("text", "transformers' name of the optimizer", default="adamw_torch"),
    "dataloader_num_workers": Field(
        "int",
        "processes per rank that read data; the seed's runs found 4 best, 8 slower",
        default=4,
        minimum=0,
        maximum=256,
    ),
    "save_steps": Field("int", "optimizer steps between checkpoints", default=2000, minimum=1),
    "save_total_limit": Field("int", "how many checkpoints to keep; absent keeps all", minimum=2),
    "logging_steps": Field("int", "optimizer steps between log lines", default=10, minimum=1),
    "torch_compile": Field("bool", "compile the model before training", default=False),
    "gradient_checkpointing": Field(
        "bool", "recompute activations in the backward pass to save memory", default=True
    ),
    "attention": Field(
        "text",
        "auto takes flash_attention_2 where it is installed, else sdpa",
        default="auto",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    ),
    "engine": Field(
        "text",
        "who loads the model: auto takes Unsloth where it is installed and the run has one GPU",
        default="auto",
        choices=("auto", "trl", "unsloth"),
    ),
    "data_sha256": Field(
        "text",
        "the data file must have this checksum",
        pattern="[0-9a-f]{64}",
        shape="64 hexadecimal digits",
    ),
    "dataset_rows": Field(
        "int",
        "how many rows the data has, so that the steps are known beforehand; checked at the start",
        minimum=1,
    ),
    "disk_gib": Field(
        "number",
        "free space that the checkpoint folder must have at the start (default: what two"
        " checkpoints take)",
        minimum=0,
    ),
    "export_dir": Field(
        "path",
        "Hugging Face directory that the finished run leaves, the update merged and compared; what"
        " a pipeline hands on",
    ),
    "seed": Field(
        "int",
        "of the data order and of the update's first weights",
        default=3407,
        minimum=0,
        maximum=2**31 - 1,
    ),
    "stop_signal": Field(
        "text",
        "the signal that means: save and exit 0 at the next step",
        default="USR1",
        pattern="(SIG)?[A-Z0-9]+",
        shape="the name of a signal",
    ),
    "distributed_timeout_s": Field(
        "int", "how long a rank waits for the others", default=7200, minimum=30
    ),
    "wandb_project": Field(
        "text", "Weights & Biases project; offline unless WANDB_MODE says otherwise"
    ),
    "load_in_4bit": Field(
        "bool", "must be false: a quantised base cannot be merged without loss", default=False
    ),
    "load_in_8bit": Field("bool", "must be false, as load_in_4bit", default=False),
    "trainer": Field(
        "map",
        "more arguments of TRL's SFTConfig, by its own names; checked by it at the start",
        keys="[a-z][a-z0-9_]*",
        items=Field("any", ""),
    ),
}
# What the run decides; SFTConfig would take another value and hpctrain's guard would not know.
OWN_KEYS = frozenset(
    "output_dir resume_from_checkpoint save_strategy save_only_model load_best_model_at_end"
    " overwrite_output_dir push_to_hub hub_model_id hub_token report_to packing eval_packing"
    " padding_free dataset_kwargs model_init_kwargs deepspeed fsdp fsdp_config auto_find_batch_size"
    " ignore_data_skip remove_unused_columns use_cpu bf16 fp16 logging_strategy dataset_num_proc"
    " enable_jit_checkpoint local_rank".split()
)
# Names under which bases are published after quantisation: bitsandbytes, GPTQ, AWQ, GGUF and the
# like.
_QUANTISED = re.compile(
    r"(?:^|[-_.])(bnb|nf4|fp4|int[48]|[2-8]bits?|fp8|w[48]a(?:8|16)|gptq\w*|awq|gguf|ggml"
    r"|q[2-8]_[k0-9]\w*|exl[23]|hqq|aqlm|eetq|quip|marlin|mxfp4|nvfp4)"
    r"(?=$|[-_.])|(?:^|[-_.])([2-8])-bits?(?=$|[-_.])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class HfSftConfig:
    """A valid config: `values` has the keys of FIELDS; sources are absolute paths or hub ids."""

    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def stop_signal_number(self) -> int:
        return int(signal.Signals["SIG" + self.values["stop_signal"].removeprefix("SIG")])

    def train_batch_size(self, num_ranks: int) -> int:
        """Rows per optimizer step over all ranks."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps * num_ranks)

    def steps_for(self, num_rows: int, num_ranks: int) -> int:
        """Optimizer steps of `num_train_epochs` over so many rows, as transformers counts them.

        A rank's batches are counted up, then its accumulation steps, then the epochs
        (transformers/trainer.py, `set_initial_training_values`; accelerate/data_loader.py,
        `BatchSamplerShard.__len__` with even_batches).
        """
        batches = math.ceil(math.ceil(num_rows / self.per_device_train_batch_size) / num_ranks)
        per_epoch = max(math.ceil(batches / self.gradient_accumulation_steps), 1)
        return max(int(math.ceil(self.num_train_epochs * per_epoch)), 1)


def quantised_name(name: str) -> str:
    """The part of a model's name that says its weights are quantised, empty when none does."""
    match = _QUANTISED.search(os.path.basename(name.rstrip("/")))
    return match[0].strip("-_.") if match else ""


def quantised_problem(model_config: Mapping[str, Any]) -> str:
    """Why a model with this config.json is no full-precision base; empty when it is one."""
    for part in (
        model_config,
        *(value for value in model_config.values() if isinstance(value, dict)),
    ):
        found = part.get("quantization_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else None
            return f"its config.json has a `quantization_config`{f' ({method})' if method else ''}"
    return ""


def load_config(path: str) -> HfSftConfig:
    """The config of a YAML file, with its sources found on this machine.

    Raises UsageError with every unknown key, wrong type, broken rule and missing source, each with
    file:line:column; EnvironmentFault when the file cannot be read.
    """
    document = load_yaml(path)
    base_dir = os.path.dirname(os.path.abspath(path))
    config, problems = parse_config(document, base_dir)
    values = dict(config.values)
    bad = {problem.where for problem in problems}
    for key, kind in (("model_name", "models"), ("dataset_path", "datasets")):
        name = values[key]
        if not name or document.where(key) in bad:
            continue
        found = find_source(name, base_dir, kind)
        if found is None:
            problems.append(
                Problem(
                    f"`{name}` is neither a path nor in the hub cache",
                    where=document.where(key),
                    hint="jobs fetch nothing: download it on the login node first",
                )
            )
        values[key] = found or name
    if problems:
        raise UsageError(problems)
    return HfSftConfig(values)


def parse_config(document: Document, base_dir: str) -> tuple[HfSftConfig, list[Problem]]:
    """The config of a YAML document and every problem of it; looks at no file.

    With problems it is a best guess, good for finding more of them. Relative paths are relative to
    `base_dir`.
    """
    values, problems = check_numbers(document, FIELDS)
    values = {key: values.get(key, field.default) for key, field in FIELDS.items()}
    for key in ("model_name", "dataset_path"):
        values[key] = absolute_source(values[key] or "", base_dir)
    for key in ("start", "export_dir"):
        values[key] = os.path.normpath(os.path.join(base_dir, values[key])) if values[key] else None
    values["trainer"] = values["trainer"] or {}
    config = HfSftConfig(values)
    return config, also(problems, _contradictions(config, document))


def _contradictions(config: HfSftConfig, document: Document) -> list[Problem]:
    """Keys that are valid alone and wrong together."""
    found = []
    why = "merging an update into quantised weights corrupts the model"
    for key in ("load_in_4bit", "load_in_8bit"):
        if config.values[key]:
            found.append(
                Problem(
                    f"`{key}: true` would quantise the base",
                    where=document.where(key),
                    why=why,
                    hint="delete it: this recipe trains full-precision bases only",
                )
            )
    part = quantised_name(config.model_name)
    if part:
        found.append(
            Problem(
                f"`{config.model_name}` is a quantised base, by its name (`{part}`)",
                where=document.where("model_name"),
                why=why,
                hint="name the full-precision model it was made from",
            )
        )
    for key in config.trainer:
        if key in OWN_KEYS:
            found.append(
                Problem(
                    f"`trainer.{key}` is decided by the run itself",
                    where=document.where("trainer", key),
                    hint="delete it",
                )
            )
        elif key in FIELDS:
            found.append(
                Problem(
                    f"`trainer.{key}` has a key of its own",
                    where=document.where("trainer", key),
                    hint=f"set `{key}`",
                )
            )
    found += stop_signal_problems(config.stop_signal, document.where("stop_signal"))
    if config.max_steps and config.warmup_steps > config.max_steps:
        found.append(
            Problem(
                f"`warmup_steps: {config.warmup_steps}` is above `max_steps: {config.max_steps}`",
                where=document.where("warmup_steps"),
            )
        )
    if config.lora is not None and not config.lora.get("target_modules", True):
        found.append(
            Problem(
                "`lora.target_modules` is empty: nothing would be trained",
                where=document.where("lora"),
            )
        )
    return found
