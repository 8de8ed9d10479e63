"""The built-in SFT trainer as a recipe: run.yaml -> one config for every mode, and the command each
rank runs."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document
from hpctrain.config.run import absolute
from hpctrain.config.trainers.sft import FAMILIES, SftConfig, parse_config, resolve_batch
from hpctrain.recipes import trainer_config
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.datafiles import indexed_problems
from hpctrain.recipes.facts import Fact, Indexed, Masks, Model
from hpctrain.recipes.memory import Change, Layout, judge
from hpctrain.recipes.pace import pace
from hpctrain.recipes.rules import Judge, Rule
from hpctrain.recipes.trainer_config import extra_packages, shape_at, trainer_rules, usual_changes

CONFIG = "config.yml"
# run.yaml says these elsewhere, so that `check` knows them as paths and as data.
_ELSEWHERE = {
    "model": "recipe_options.model",
    "tokenizer": "recipe_options.tokenizer",
    "train_data_paths": "data.train",
}


def resolve(context: Context) -> Resolved:
    """The trainer's config with all that follows from the run; its problems name the line of
    run.yaml."""
    spec, options = context.spec, context.options
    noted = Judge()
    for key, place in _ELSEWHERE.items():
        noted.check(
            Rule(
                context.config.get(key) is not None,
                f"`config.{key}` is set as `{place}`",
                context.config.where_key(key),
                hint="move it there",
            )
        )
    document = _with_paths(context)
    config, found = parse_config(document, spec.base_dir)
    noted.problems += [problem for problem in found if not problem.what.endswith("is missing")]
    noted.problems += indexed_problems(spec)
    noted.check(
        Rule(
            not spec.data.get("train"),
            "no training data",
            spec.where("data"),
            hint="data: {train: [/path/to/sft_text_document]}, a prefix without .bin",
        ),
        *trainer_rules(
            spec,
            config.train_iters,
            "train_epochs",
            document.where("train_epochs"),
            "give `train_iters`; `hpctrain data count` shows how many rows an epoch has",
        ),
    )
    signal = signal_name(spec.sbatch.get("signal"))
    if signal and "stop_signal" not in (document.data or {}):
        config = dataclasses.replace(config, stop_signal=signal)
    try:
        batch = resolve_batch(config, context.world_size, context.config.where("train_batch_size"))
        config = dataclasses.replace(
            config,
            train_batch_size=batch.train_batch_size,
            gradient_accumulation_steps=batch.accumulation,
        )
    except UsageError as error:
        noted.problems += error.problems
    memory, found = _memory(config, context)
    noted.problems += found
    failed = any(problem.level == "error" for problem in noted.problems)
    paths = [("model", config.model, spec.where("recipe_options", "model"))]
    if config.tokenizer:
        paths.append(("tokenizer", config.tokenizer, spec.where("recipe_options", "tokenizer")))
    for number, prefix in enumerate(config.train_data_paths):
        where = spec.where("data", "train", number)
        paths += [
            (f"training data ({ending})", f"{prefix}.{ending}", where) for ending in ("bin", "idx")
        ]
    return Resolved(
        argv=(options["python"], "-u", "-m", "hpctrain.train.sft"),
        workdir=context.run_dir,
        configs={} if failed else {CONFIG: config_text(config, spec.name)},
        config_for={mode: CONFIG for mode in ("scratch", "finetune", "resume")},
        guard=Guard(
            layout="deepspeed",
            target=config.train_iters,
            tensor_parallel=1,
            data_parallel=context.world_size,
            zero_stage=config.zero_stage,
            # A config alone has no weights.
            scratch_from=_FRESH["random" if config.model.endswith(".json") else config.init].format(
                config.model
            ),
        ),
        cadence=Cadence(config.train_iters, config.checkpoint_factor, saves_on_signal=True),
        paths=tuple(paths),
        binds=(
            (("folder of the exported model", os.path.dirname(config.export_dir)),)
            if config.export_dir
            else ()
        ),
        model=config.export_dir,
        facts=_facts(config, document, context),
        decisions=(*_decisions(config, context), *memory),
        problems=tuple(noted.problems),
    )


def _facts(config: SftConfig, document: Document, context: Context) -> tuple[Fact, ...]:
    """What `check` opens: the data sets, the model, and what of the environment the config asks."""
    where, where_model = document.where, context.spec.where("recipe_options", "model")
    rows = config.train_iters and config.train_batch_size
    prefixes = tuple(
        (prefix, context.spec.where("data", "train", number))
        for number, prefix in enumerate(config.train_data_paths)
    )
    one_file = config.model.endswith(".json")
    data = Indexed(
        prefixes,
        config.seq_length,
        where("seq_length"),
        masks=Masks(
            config.loss_mask_pairs,
            config.loss_mask_alternating_individual,
            config.loss_mask_individual,
            where("loss_mask_pairs"),
            where("loss_mask_alternating_individual"),
            where("loss_mask_individual"),
        ),
        tokenizer=config.tokenizer,
        where_tokenizer=context.spec.where("recipe_options", "tokenizer"),
        rows=(config.train_iters or 0) * (config.train_batch_size or 0) if rows else None,
        where_rows=where("train_iters"),
        config=config.model if one_file else os.path.join(config.model, "config.json"),
        where_config=where_model,
    )
    model = Model(
        "model",
        config.model,
        where_model,
        FAMILIES,
        "the recipe hf-sft trains any family that transformers knows",
        config.seq_length,
        where("seq_length"),
        weights=config.init == "pretrained",
        tokenizer=False,
        full_precision=True,
    )
    return data, model, extra_packages(context, document, config.wandb_project, config.attention)


def _memory(config: SftConfig, context: Context) -> tuple[tuple[Decision, ...], list[Problem]]:
    """The trainer takes gradients in fp32 from stage 1 on, with which DeepSpeed uses its
    BF16_Optimizer; logits are reckoned as if every token were trained."""
    shape = shape_at(config.model)
    if shape is None or config.precision != "bf16":
        return (), []
    ranks = context.world_size
    layout = Layout(
        "bf16opt" if config.zero_stage == 1 else f"zero{config.zero_stage}",
        config.train_micro_batch_size_per_gpu * config.seq_length,
        config.seq_length,
        shards=ranks,
        gpus=ranks,
        accumulates=(config.gradient_accumulation_steps or 1) > 1,
        checkpointing=config.activation_checkpointing,
    )
    sharded = layout._replace(sharding="zero3")
    more = [Change("`zero_stage: 3`", sharded)] if ranks > 1 and config.zero_stage < 3 else []
    changes = usual_changes(
        layout, "train_micro_batch_size_per_gpu", "activation_checkpointing", *more
    )
    where = context.spec.where("recipe_options", "model")
    decisions, problems = judge(context, shape, layout, where, changes)
    paced = pace(context, shape, layout, config.train_batch_size or 1, config.train_iters)
    return (*decisions, *paced), problems


# `init` in the words of the guard, as `hpctrain.train.sft.loop` decides it.
_FRESH = {
    "auto": "the weights of `{}`, random ones where it has none",
    "pretrained": "the weights of `{}`",
    "random": "random weights",
}


def config_text(config: SftConfig, name: str) -> str:
    """The trainer's config as YAML, every key with its sentence, so that the file explains
    itself."""
    fields = {item.name: item.metadata["field"] for item in dataclasses.fields(config)}
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(config).items()
    }
    return trainer_config.config_text(
        "hpctrain.train.sft", name, fields, values, lambda key, value: value == []
    )


def _with_paths(context: Context) -> Document:
    """The config with the paths that run.yaml gives elsewhere, each with its own position."""
    document, spec = context.config, context.spec
    data = dict(document.data or {})
    origins, keys = dict(document.origins), dict(document.key_origins)
    given: dict[str, Any] = {
        key: absolute(context.options[key], spec.base_dir)
        for key in ("model", "tokenizer")
        if context.options[key]
    }
    if spec.data.get("train"):
        given["train_data_paths"] = [
            re.sub(r"\.(bin|idx)\Z", "", path) for path in spec.data["train"]
        ]
    for key, value in given.items():
        data[key] = value
    for key in _ELSEWHERE:
        # Positions of the config's own section would be wrong for what stands elsewhere.
        for table in (origins, keys):
            for path in [path for path in table if path[:1] == (key,)]:
                del table[path]
    for path, origin in spec.document.origins.items():
        if path[:2] == ("data", "train"):
            inner = ("train_data_paths", *path[2:])
            origins[inner] = origin
        if path[:1] == ("recipe_options",) and path[1:2] in (("model",), ("tokenizer",)):
            origins[path[1:]] = origin
    return Document(data, origins, keys, document.name or spec.source)


def signal_name(override: Any) -> str | None:
    """The signal of an `--signal` option, without SIG; None where it names none."""
    match = re.fullmatch(r"(?:B:)?(?:SIG)?([A-Z0-9]+)(?:@\d+)?", str(override or ""))
    return match[1] if match else None


def _decisions(config: SftConfig, context: Context) -> tuple[Decision, ...]:
    total, gas = config.train_batch_size, config.gradient_accumulation_steps
    product = (
        f"{config.train_micro_batch_size_per_gpu} x {gas} accumulation x {context.world_size} ranks"
    )
    return (
        Decision("step.program", "hpctrain.train.sft", "the built-in trainer", "recipe sft"),
        Decision(
            "batch.train_batch_size", total, product, context.config.where("train_batch_size")
        ),
        Decision(
            "batch.data_parallel_size",
            context.world_size,
            "one rank per task",
            context.spec.where("nodes"),
        ),
        Decision(
            "checkpoint.every",
            config.checkpoint_factor,
            "`checkpoint_factor`",
            context.config.where("checkpoint_factor"),
        ),
        Decision(
            "model",
            os.path.basename(config.model),
            "as the run says",
            context.spec.where("recipe_options", "model"),
        ),
    )
