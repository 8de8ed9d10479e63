"""The built-in DPO trainer as a recipe: run.yaml and a config_dpo.yaml -> one config for every
mode."""

from __future__ import annotations

import dataclasses
import os

from hpctrain.base.errors import Problem
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document
from hpctrain.config.run import absolute
from hpctrain.config.trainers.dpo import FAMILIES, FIELDS, DpoConfig, parse_config
from hpctrain.recipes import trainer_config
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.facts import Fact, Model, Rows
from hpctrain.recipes.memory import Change, Layout, judge
from hpctrain.recipes.rules import Judge, Rule
from hpctrain.recipes.sft import signal_name
from hpctrain.recipes.trainer_config import extra_packages, shape_at, trainer_rules, usual_changes

CONFIG = "config_dpo.yaml"


def resolve(context: Context) -> Resolved:
    """The trainer's config with all that follows from the run; its problems name the line of
    run.yaml or base_config."""
    spec, options = context.spec, context.options
    noted = Judge()
    document = trainer_config.layered(context, noted, "pairs are", "dataset", "dataset_name")
    config, found = parse_config(document, spec.base_dir)
    noted.problems += found
    training, handed = config.training, spec.handed
    policy = handed.model if handed and handed.model == config.policy_name else None
    noted.check(
        *trainer_rules(
            spec,
            training["max_steps"],
            "epochs",
            document.where("dpo_training", "epochs"),
            "give `dpo_training.max_steps`: epochs x pairs / train_batch_size",
        ),
        Rule(
            policy and config.ref_name not in (None, policy),
            f"the reference model `{config.ref_name}` is not the one that stage"
            f" `{handed.stage if handed else ''}` hands over",
            document.where("ref_name"),
            level="warning",
            why="DPO holds the policy to its reference, which is the model that it starts from"
            " unless you mean another",
            hint="set: {config.ref_name: null} in pipeline.yaml takes the policy itself",
        ),
        Rule(
            training["fsdp"] and context.world_size == 1,
            "`fsdp: true` with one process shards nothing",
            document.where("dpo_training", "fsdp"),
            level="warning",
            hint="give the run more GPUs, or set it to false",
        ),
    )
    signal = signal_name(spec.sbatch.get("signal"))
    if signal and document.get("dpo_training", "stop_signal") is None:
        config = dataclasses.replace(config, training={**training, "stop_signal": signal})
    if spec.checkpoint_start and config.ref_name is None:
        # Once there are checkpoints of its own, a link no longer starts from this one and could not
        # find it.
        config = dataclasses.replace(
            config, ref_name=absolute(spec.checkpoint_start, spec.base_dir)
        )
    memory, wrong = _memory(config, document, context)
    noted.problems += wrong
    failed = any(problem.level == "error" for problem in noted.problems)
    return Resolved(
        argv=(options["python"], "-u", "-m", "hpctrain.train.dpo"),
        workdir=context.run_dir,
        configs={} if failed else {CONFIG: config_text(config, spec.name)},
        config_for={mode: CONFIG for mode in ("scratch", "finetune", "resume")},
        guard=Guard(
            layout="dcp",
            target=training["max_steps"],
            tensor_parallel=1,
            scratch_from=f"the policy model `{config.policy_name}`" if config.policy_name else "",
        ),
        cadence=Cadence(training["max_steps"], training["save_steps"], saves_on_signal=True),
        paths=_paths(config, document),
        model=os.path.join(config.mount_dir or context.run_dir, "dpo_model"),
        facts=_facts(config, document, context),
        decisions=(*_decisions(config, document, context), *memory),
        problems=tuple(noted.problems),
    )


def config_text(config: DpoConfig, name: str) -> str:
    """The trainer's config as YAML, every key with its sentence."""
    return trainer_config.config_text(
        "hpctrain.train.dpo", name, FIELDS, config.as_dict(), lambda key, value: False
    )


def _paths(config: DpoConfig, document: Document) -> tuple[tuple[str, str, str], ...]:
    """What must be at the site; a hub id is found in its cache there, if at all."""
    named = [
        ("policy model", config.policy_name, document.where("policy_name")),
        ("reference model", config.ref_name, document.where("ref_name")),
        (
            "preference pairs",
            config.dataset["dataset_name"],
            document.where("dataset", "dataset_name"),
        ),
    ]
    return tuple((what, path, where) for what, path, where in named if path and os.path.isabs(path))


_MAX_LOGITS = 2**26  # numbers that the trainer computes at once (hpctrain/train/dpo/model.py)


def _memory(
    config: DpoConfig, document: Document, context: Context
) -> tuple[tuple[Decision, ...], list[Problem]]:
    """Both replies of a pair pass through at once; the reference's log-probabilities are cached, so
    that it takes nothing while training."""
    shape = shape_at(config.policy_name or "")
    if shape is None:
        return (), []
    training, ranks = config.training, context.world_size
    length = config.dataset["max_len"]
    layout = Layout(
        "fsdp2" if training["fsdp"] and ranks > 1 else "ddp",
        2 * training["batch_size"] * length,
        2 * length,
        shards=ranks if training["fsdp"] else 1,
        gpus=ranks,
        accumulates=training["gradient_accumulation_steps"] > 1,
        checkpointing=training["activation_checkpointing"],
        logits_limit=_MAX_LOGITS,
    )
    sharded = layout._replace(sharding="fsdp2", shards=ranks)
    more = [Change("`fsdp: true`", sharded)] if ranks > 1 and not training["fsdp"] else []
    changes = usual_changes(layout, "batch_size", "activation_checkpointing", *more)
    return judge(context, shape, layout, document.where("policy_name"), changes)


# What a pair may look like (hpctrain/train/dpo/records.py `parse_record`), the commonest first.
_SHAPES = (
    {"prompt": "reply", "chosen": "reply", "rejected": "reply"},
    {"question": "text", "chosen": "reply", "rejected": "reply"},
    {"chosen": "messages", "rejected": "messages"},
)


def _facts(config: DpoConfig, document: Document, context: Context) -> tuple[Fact, ...]:
    """What `check` opens: the pairs, both models, and what of the environment the config asks."""
    where, name = document.where, config.dataset["dataset_name"]
    where_name = where("dataset", "dataset_name")
    handed = context.spec.handed.model if context.spec.handed else None
    models = [
        Model(
            what,
            path,
            document.where(key),
            FAMILIES,
            "the recipes hf-sft and open-instruct-dpo train any family that transformers knows",
            config.dataset["max_len"],
            where("dataset", "max_len"),
            full_precision=True,
        )
        for what, path, key in (
            ("policy", config.policy_name, "policy_name"),
            ("reference", config.ref_name, "ref_name"),
        )
        if path and os.path.isabs(path) and path != handed
    ]
    pairs = Rows(
        ((name, where_name),) if name and os.path.isabs(name) else (),
        _SHAPES,
        split=config.dataset["split"],
        where_split=where("dataset", "split"),
    )
    attention = config.training["attention"]
    wanted = extra_packages(context, document, config.wandb_project, attention, "dpo_training")
    return (pairs, *models, wanted)


def _decisions(config: DpoConfig, document: Document, context: Context) -> tuple[Decision, ...]:
    training, ranks = config.training, context.world_size
    product = (
        f"{training['batch_size']} x {training['gradient_accumulation_steps']} accumulation x"
        f" {ranks} ranks"
    )
    where = document.where
    model = config.ref_name or config.policy_name
    reason = "`ref_name`" if document.get("ref_name") else "the policy before training"
    sharding = "FSDP2 over all ranks" if training["fsdp"] else "a whole copy on each rank"
    return (
        Decision("step.program", "hpctrain.train.dpo", "the built-in trainer", "recipe dpo"),
        Decision(
            "batch.train_batch_size",
            config.train_batch_size(ranks),
            product + ", in pairs",
            where("dpo_training", "batch_size"),
        ),
        Decision(
            "batch.data_parallel_size", ranks, "one rank per task", context.spec.where("nodes")
        ),
        Decision(
            "dpo.sharding",
            "fsdp" if training["fsdp"] else "none",
            sharding,
            where("dpo_training", "fsdp"),
        ),
        Decision(
            "dpo.reference",
            os.path.basename(model),
            f"{reason}; its log-probabilities are cached once",
            where("ref_name") if document.get("ref_name") else "",
        ),
        Decision(
            "checkpoint.every",
            training["save_steps"],
            "`save_steps`",
            where("dpo_training", "save_steps"),
        ),
        Decision(
            "model", os.path.basename(config.policy_name), "as the run says", where("policy_name")
        ),
    )
