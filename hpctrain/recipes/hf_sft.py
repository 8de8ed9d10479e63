"""SFT of a full-precision base through TRL as a recipe: run.yaml -> one config for every mode,
estimates, refusals."""

from __future__ import annotations

import os
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.shell import ShellText, node_path
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document
from hpctrain.config.run import absolute
from hpctrain.config.trainers.trl import (
    FIELDS,
    HfSftConfig,
    parse_config,
    quantised_name,
    quantised_problem,
)
from hpctrain.recipes import hf_estimate, trainer_config
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.facts import Fact, Model, Rows
from hpctrain.recipes.memory import Change, Layout, judge
from hpctrain.recipes.rules import Judge, Rule
from hpctrain.recipes.sft import signal_name
from hpctrain.recipes.trainer_config import (
    extra_packages,
    read_model,
    shape_at,
    trainer_rules,
    usual_changes,
)

CONFIG = "config_sft.yaml"
_STAGE = "{tmp}/{user}-{job}-data"


def resolve(context: Context) -> Resolved:
    """The trainer's config with all that follows from the run; its problems name the line of
    run.yaml or base_config."""
    spec, options = context.spec, context.options
    noted = Judge()
    document = trainer_config.layered(context, noted, "data is", "dataset_path")
    config, found = parse_config(document, spec.base_dir)
    noted.problems += found
    _check_base(noted, config, document, context)
    config = _with_steps(config, context)
    noted.check(
        *trainer_rules(
            spec,
            config.max_steps,
            "num_train_epochs",
            document.where("num_train_epochs"),
            "give `dataset_rows`, from which the steps follow, or `max_steps`",
        ),
        Rule(
            document.get("start") is not None,
            "`config.start` is set as `checkpoint.start`",
            document.where_key("start"),
            hint="move it there",
        ),
    )
    if spec.checkpoint_start and document.get("start") is None:
        # Later links no longer start from it, but a whole model there stays what the update belongs
        # to.
        config = HfSftConfig(
            {**config.values, "start": absolute(spec.checkpoint_start, spec.base_dir)}
        )
    signal = signal_name(spec.sbatch.get("signal"))
    if signal and document.get("stop_signal") is None:
        config = HfSftConfig({**config.values, "stop_signal": signal})
    stage, decided, wrong = _stage(context)
    estimated, contradictions = hf_estimate.estimate(config, context, document)
    broken = any(problem.level == "error" for problem in noted.problems)
    memory, too_much = ((), []) if broken else _memory(config, document, context)
    noted.problems += [*wrong, *contradictions, *too_much]
    failed = any(problem.level == "error" for problem in noted.problems)
    return Resolved(
        argv=(options["python"], "-u", "-m", "hpctrain.train.trl"),
        workdir=context.run_dir,
        configs={} if failed else {CONFIG: config_text(config, spec.name)},
        config_for={mode: CONFIG for mode in ("scratch", "finetune", "resume")},
        guard=Guard(
            layout="hf-trainer",
            target=config.max_steps,
            scratch_from=(
                f"the base model `{config.values['model_name']}`"
                if config.values["model_name"]
                else ""
            ),
        ),
        cadence=Cadence(config.max_steps, config.save_steps, saves_on_signal=True),
        template={"stage": stage},
        paths=_paths(config, document),
        binds=_binds(config, str(options["stage"])),
        model=config.export_dir,
        facts=_facts(config, document, context),
        decisions=(*_decisions(config, document, context), decided, *estimated, *memory),
        problems=tuple(noted.problems),
    )


def config_text(config: HfSftConfig, name: str) -> str:
    """The trainer's config as YAML, every key with its sentence."""

    def left_out(key: str, value: Any) -> bool:
        return value == {} or (key.startswith("load_in_") and not value)

    return trainer_config.config_text("hpctrain.train.trl", name, FIELDS, config.values, left_out)


def _check_base(noted: Judge, config: HfSftConfig, document: Document, context: Context) -> None:
    """A base, or a start, whose own files say that it is quantised; asked only where they can be
    seen from here.

    The trainer asks again before it loads anything, so a base that is not visible here is refused
    there.
    """
    spec = context.spec
    named = [("base", config.model_name, document.where("model_name"))]
    if spec.checkpoint_start:
        named.append(("start", spec.checkpoint_start, spec.where("checkpoint", "start")))
    for what, path, where in named:
        if not os.path.isabs(path):
            continue
        why = quantised_problem(read_model(path))
        adapter = read_model(os.path.join(path, "adapter_config.json"))
        base = str(adapter.get("base_model_name_or_path") or "")
        if not why and quantised_name(base):
            why = f"its adapter_config.json is of the base `{base}`"
        noted.check(
            (
                Rule(
                    why,
                    f"the {what} `{path}` is quantised: {why}",
                    where,
                    hint="name the full-precision model it was made from",
                ),
                Rule(
                    adapter and what == "base",
                    f"the base `{path}` is an adapter of `{base}`, no model",
                    where,
                    hint=f"`model_name: {base}`, and the adapter as `checkpoint.start`",
                ),
            )
        )


def _with_steps(config: HfSftConfig, context: Context) -> HfSftConfig:
    if config.max_steps is None and config.dataset_rows:
        return HfSftConfig(
            {
                **config.values,
                "max_steps": config.steps_for(config.dataset_rows, context.world_size),
            }
        )
    return config


def _stage(context: Context) -> tuple[ShellText | None, Decision, list[Problem]]:
    """The folder of each node that the data is copied to, None for none."""
    wish, where = context.options["stage"], context.spec.where("recipe_options", "stage")
    kind, tmp = context.node_type.tmp_kind, context.node_type.tmp_path
    if wish == "none" or (wish == "auto" and kind != "disk"):
        reason = (
            "as the run says"
            if wish == "none"
            else f"{tmp} of the nodes is {kind or 'of an unknown kind'}, no disk"
        )
        return None, Decision("data.stage", "none", reason, where), []
    if wish in ("auto", "node"):
        reason = (
            f"each node's own {tmp}; checked by hash"
            if wish == "node"
            else f"{tmp} is each node's own disk"
        )
        return (
            node_path(_STAGE, tmp),
            Decision("data.stage", _STAGE.replace("{tmp}", tmp), reason, where),
            [],
        )
    if not wish.startswith("/"):
        problem = Problem(
            f"`stage: {wish}` is no folder of a node",
            where=where,
            hint="auto, node, none, or a path such as /local",
        )
        return None, Decision("data.stage", wish, "", where), [problem]
    pattern = wish.rstrip("/") + "/{user}-{job}-data"
    return (
        node_path(pattern, tmp),
        Decision("data.stage", pattern, "as the run says; checked by hash", where),
        [],
    )


def _binds(config: HfSftConfig, stage: str) -> tuple[tuple[str, str], ...]:
    """Folders that a container must see beside those that every run has."""
    found = [("stage folder", stage)] if stage.startswith("/") else []
    if config.export_dir:
        found.append(("folder of the exported model", os.path.dirname(config.export_dir)))
    return tuple(found)


def _paths(config: HfSftConfig, document: Document) -> tuple[tuple[str, str, str], ...]:
    """What must be at the site; a hub id is found in its cache there, if at all."""
    named = [
        ("base model", config.model_name, document.where("model_name")),
        ("training data", config.dataset_path, document.where("dataset_path")),
    ]
    return tuple((what, path, where) for what, path, where in named if path and os.path.isabs(path))


def _memory(
    config: HfSftConfig, document: Document, context: Context
) -> tuple[tuple[Decision, ...], list[Problem]]:
    """A whole copy on each rank: all weights with fp32 masters, or a frozen base with an update.

    The loss is reckoned as TRL computes it since 1.7, in chunks; older ones need more. Unsloth,
    which `auto` takes on one GPU, keeps the inputs of layers in the host's memory. Nothing is said
    where `trainer:` shards or offloads by itself, or of an optimizer that is no AdamW.
    """
    shape, lora = shape_at(config.model_name or ""), config.lora
    optim, more_keys = str(config.values["optim"]), config.values["trainer"] or {}
    if shape is None or config.values["precision"] != "bf16" or not optim.startswith("adamw"):
        return (), []
    if any(key.startswith(("fsdp", "deepspeed")) for key in more_keys):
        return (), []
    engine = config.values["engine"]
    unsloth = engine == "unsloth" or (engine == "auto" and context.world_size == 1)
    attention = 2 * shape.hidden + shape.query + shape.key
    update = int(lora["r"] * shape.layers * 2 * (attention + 2 * shape.mlp)) if lora else None
    length = config.max_length
    layout = Layout(
        "ddp",
        config.per_device_train_batch_size * length,
        length,
        gpus=context.world_size,
        accumulates=config.gradient_accumulation_steps > 1,
        adapters=update,
        all_linears=True,
        checkpointing=bool(config.values["gradient_checkpointing"]),
        residual=0 if unsloth else 2,
        loss="chunked",
        optimizer_bytes=2.1 if "8bit" in optim else 0,
    )
    more = []
    if not lora:
        adapters = shape.layers * 32 * (attention + 2 * shape.mlp)
        frozen = layout._replace(adapters=adapters, all_linears=True)
        more = [Change("`lora: {r: 16}`", frozen)]
    changes = usual_changes(layout, "per_device_train_batch_size", "gradient_checkpointing", *more)
    return judge(context, shape, layout, document.where("model_name"), changes)


# What a row may look like (hpctrain/train/trl/rows.py), in the order in which the trainer asks.
_SHAPES = (
    {"messages": "messages"},
    {"conversations": "messages"},
    {"prompt": "reply", "completion": "reply"},
    {"text": "text"},
    {"input_ids": "ids"},
)


def _facts(config: HfSftConfig, document: Document, context: Context) -> tuple[Fact, ...]:
    """What `check` opens: the rows, the base, and what of the environment the config asks."""
    where, base, path = document.where, config.model_name, config.dataset_path
    handed = context.spec.handed.model if context.spec.handed else None
    local = bool(base) and os.path.isabs(base) and base != handed
    rows = Rows(
        ((path, where("dataset_path")),) if path and os.path.isabs(path) else (),
        _SHAPES,
        stated=config.dataset_rows,
        where_stated=where("dataset_rows"),
        template_of=base if local else None,
    )
    model = Model(
        "base",
        base,
        where("model_name"),
        length=config.max_length,
        where_length=where("max_length"),
    )
    others = {}
    if config.values["engine"] == "unsloth":
        others["unsloth"] = ("`engine: unsloth`", where("engine"))
    if "8bit" in str(config.values["optim"]) or "paged" in str(config.values["optim"]):
        others["bitsandbytes"] = (f"`optim: {config.values['optim']}`", where("optim"))
    project, attention = config.values["wandb_project"], str(config.values["attention"])
    wanted = extra_packages(context, document, project, attention, others=others)
    return (rows, *([model] if local else []), wanted)


def _decisions(config: HfSftConfig, document: Document, context: Context) -> tuple[Decision, ...]:
    ranks, where = context.world_size, document.where
    accumulation = config.gradient_accumulation_steps
    product = (
        f"{config.per_device_train_batch_size} x {accumulation} accumulation x {ranks} ranks, in"
        " rows"
    )
    lora = config.lora
    update = f"LoRA r {lora['r']}, alpha {lora['alpha']:g}" if lora else "all weights"
    steps = (
        f"{config.dataset_rows:,} rows x {config.num_train_epochs:g} epochs"
        if config.dataset_rows
        else "`max_steps`"
    )
    found = [
        Decision("step.program", "hpctrain.train.trl", "TRL's SFTTrainer, driven", "recipe hf-sft"),
        Decision(
            "model", os.path.basename(config.model_name), "as the run says", where("model_name")
        ),
        Decision("model.trained", update, "of a full-precision base", where("lora")),
        Decision(
            "batch.train_batch_size",
            config.train_batch_size(ranks),
            product,
            where("per_device_train_batch_size"),
        ),
        Decision(
            "batch.data_parallel_size",
            ranks,
            "one rank per task, a whole copy of the model on each",
            context.spec.where("nodes"),
        ),
        Decision(
            "config.gradient_accumulation_steps",
            accumulation,
            "as the run says",
            where("gradient_accumulation_steps"),
        ),
        Decision("checkpoint.every", config.save_steps, "`save_steps`", where("save_steps")),
    ]
    if config.max_steps:
        given = document.get("max_steps") is not None
        reason = "`max_steps`" if given else f"{steps} / {config.train_batch_size(ranks)} a step"
        found.append(
            Decision(
                "max_steps",
                config.max_steps,
                reason,
                where("max_steps" if given else "dataset_rows"),
            )
        )
    return tuple(found)
