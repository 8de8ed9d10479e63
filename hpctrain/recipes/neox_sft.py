"""Supervised fine-tuning with GPT-NeoX, upstream or the Tilde fork: run.yaml and base configs ->
one config per mode.

The rules are in `hpctrain/recipes/neox/`; here they are put in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hpctrain.base.paths import shipped_text
from hpctrain.config.decision import Decision
from hpctrain.config.run import absolute
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.datafiles import indexed_problems
from hpctrain.recipes.neox import batch, data, export, launch, memory, model, ranges, saving
from hpctrain.recipes.neox.configs import MAX_TEXT_BYTES, config_text
from hpctrain.recipes.neox.draft import Draft, make_draft
from hpctrain.recipes.neox.keys import FLAVOR_NAMES
from hpctrain.recipes.rules import Rule


def resolve(context: Context) -> Resolved:
    """Everything decided about a NeoX run: its configs, the step, the guard's facts, and all
    problems at once.

    A config is written only when there is no error. `template` holds what
    templates/neox-sft/job.sbatch.j2 needs.
    """
    spec, options = context.spec, context.options
    flavor, starter = options["flavor"], options["launch"]
    folder = absolute(options["dir"], spec.base_dir)
    train_script = os.path.join(folder, options["train_script"])
    where_nodes = spec.where("nodes")
    bases = context.read.get("base_config", ())

    draft = make_draft(
        flavor,
        context.recipe.document.section("config"),
        bases,
        spec.document.section("config"),
        options["extra_keys"],
    )
    ranks_per_node = context.gpus_per_node or context.tasks_per_node
    launch.decide_launcher(draft, starter)
    shape = batch.decide_shape(draft, context.num_nodes, ranks_per_node, where_nodes)
    batch.decide_batch(draft, shape, where_nodes)
    model.check_model(draft, shape)
    zero_stage = model.check_precision(draft, shape)
    model.check_optimizer(draft)
    ranges.check_ranges(draft)
    model.decide_clipping(draft)
    data.decide_data(draft, spec.data, spec.where)
    draft.problems += indexed_problems(spec)
    data.decide_reading(draft)
    data.decide_packing(draft)
    data.decide_loss_mask(draft)
    data.check_tokenizer(draft)
    start = saving.find_start(draft, spec)
    saving.decide_folder(draft, spec)
    saving.decide_finetune(draft, spec)
    offset = saving.decide_offset(draft, start, spec)
    train_iters = saving.decide_length(draft)
    saves = saving.decide_saves(draft, train_iters, spec)
    saving.check_exit(draft, saves, spec)
    saving.check_retention(draft, saves, start)
    saving.check_collision(draft, saves, start, spec)
    saving.check_fork_schedule(draft, offset, start)
    override = saving.decide_resume_schedule(draft)
    launch.decide_tracking(draft, starter, spec)
    launch.check_devices(draft, spec)
    env = launch.environment(draft, spec)
    _check_launch(draft, context)

    modes = ("finetune", "resume") if spec.has_start else ("scratch", "resume")
    by_mode = {mode: mode_values(draft, mode, override) for mode in modes}
    differs = [
        key
        for key in by_mode["resume"]
        if any(values.get(key) != by_mode["resume"][key] for values in by_mode.values())
    ]
    configs = {
        f"config.{mode}.yml": _config(draft, mode, values, differs)
        for mode, values in by_mode.items()
    }
    longest = max(len(text.encode("utf-8", "replace")) for text in configs.values())
    draft.check(
        Rule(
            longest > MAX_TEXT_BYTES,
            f"the NeoX config would have {longest} bytes, and at most {MAX_TEXT_BYTES} can be"
            " handed to the ranks",
            where=spec.where("config"),
            why="NeoX carries it to every rank as one argument, which Linux limits to 128 KiB",
            hint="merge the data sets with `hpctrain data merge`, so that fewer paths are needed",
        )
    )
    exporting: dict[str, Any] = {"refused": "the run has errors", "architecture": None}
    if any(problem.level == "error" for problem in draft.problems):
        configs = {}
    else:
        exporting, text = export.decide_export(draft, context)
        if text:
            configs[export.CONFIG] = text
    every = int(saves.factor) if saves.factor and not saves.log else None
    target = None if train_iters is None else train_iters + offset
    at = spec.where("recipe_options", "activate")
    activate = absolute(options["activate"], spec.base_dir) if options["activate"] else None
    memory_decisions = memory.decide(draft, context, shape, zero_stage)
    return Resolved(
        argv=_argv(options["python"], starter, folder, train_script),
        tasks_argv=(
            _argv(options["python"], launch.SRUN, folder, train_script)
            if starter == launch.DEEPY
            else ()
        ),
        workdir=folder,
        configs=configs,
        config_for={mode: f"config.{mode}.yml" for mode in modes},
        files=_files(starter, exporting),
        env=env,
        guard=Guard(
            layout="deepspeed",
            target=target,
            tensor_parallel=shape.tensor,
            pipeline_parallel=shape.pipeline,
            data_parallel=shape.data,
            zero_stage=zero_stage,
            counter="greatest_folder" if offset else "latest",
            retention=saving.retention(draft, saves, start) is not None,
        ),
        cadence=Cadence(train_iters, every),
        template={
            "launch": starter,
            "python": options["python"],
            "neox_dir": folder,
            "train_script": train_script,
            "activate": activate,
            "export": exporting,
        },
        facts=data.facts(draft, spec, folder, shape.data),
        paths=launch.needed_paths(draft, spec, folder, train_script, starter)
        + ((("activation script", activate, at),) if activate else ()),
        decisions=(
            *_own_decisions(context, folder, start, offset, target),
            *draft.all_decisions(),
            *memory_decisions,
            *_mode_decisions(modes, override),
            _export_decision(exporting),
        ),
        problems=tuple(draft.problems),
    )


def mode_values(draft: Draft, mode: str, override: bool) -> dict[str, Any]:
    """The values of one mode: the draft's, `finetune`, and on a resume the schedule's owner."""
    values = {name: value for name, value in draft.values.items() if value is not None}
    values["finetune"] = mode == "finetune"
    if override and mode == "resume":
        values["override_lr_scheduler"] = True
    return values


def _config(draft: Draft, mode: str, values: dict[str, Any], differs: list[str]) -> str:
    what = {
        "scratch": "the first link of a run from scratch",
        "finetune": (
            "the first link: weights of the start checkpoint, a fresh optimizer, iterations from 0"
        ),
        "resume": (
            "every later link: weights, optimizer, schedule and iteration of the newest complete"
            " checkpoint"
        ),
    }[mode]
    header = (
        f"Configuration for {FLAVOR_NAMES[draft.flavor]}, mode `{mode}`: {what}.",
        (
            "Made by hpctrain render from run.yaml, its base configs and the recipe neox-sft: edit"
            " run.yaml instead."
        ),
        "Complete in itself; `hpctrain plan` says why each value is as it is.",
        f"The modes differ in: {', '.join(sorted(differs)) or 'nothing'}.",
    )
    return config_text(values, draft.keys, header)


def _argv(python: str, starter: str, folder: str, train_script: str) -> tuple[str, ...]:
    """What runs: every task's train.py, or deepy.py once. The job template adds the configuration
    when the job starts."""
    if starter == launch.DEEPY:
        return (python, os.path.join(folder, "deepy.py"), train_script)
    return (python, "-u", train_script)


def _check_launch(draft: Draft, context: Context) -> None:
    spec, options = context.spec, context.options
    if options["launch"] == launch.DEEPY:
        draft.check(
            Rule(
                spec.container,
                "`launch: deepy` does not work with `container`",
                where=spec.where("container"),
                why="NeoX's launcher issues srun itself, which is not inside containers, and starts"
                " the ranks outside of it",
                hint="recipe_options: {launch: srun}, or leave `container` out and give `activate`",
            )
        )
    elif options["activate"]:
        draft.error(
            "`activate` is for `launch: deepy`",
            where=spec.where("recipe_options", "activate"),
            why="with `launch: srun` python runs in the container",
            hint="delete it",
        )


def _own_decisions(
    context: Context, folder: str, start: saving.Start | None, offset: int, target: int | None
) -> Iterator[Decision]:
    spec, options = context.spec, context.options
    launch_reason = {
        launch.SRUN: (
            "hpctrain's srun: CPU binding, kill-on-bad-exit and container are the job script's"
        ),
        launch.DEEPY: "NeoX's own launcher, with a hostfile made in each job",
    }[options["launch"]]
    for name, value, reason in (
        ("dir", folder, "NeoX working copy; tasks run in it"),
        ("flavor", options["flavor"], FLAVOR_NAMES[options["flavor"]]),
        ("launch", options["launch"], launch_reason),
    ):
        yield Decision(f"neox.{name}", value, reason, spec.where("recipe_options", name))
    if start:
        reason = f"from the folder's name `{os.path.basename(start.path)}`"
        where = spec.where("checkpoint", "start")
        yield Decision("checkpoint.start_iteration", start.iteration, reason, where)
    if target is not None:
        iterations = f"iteration_offset {offset} + train_iters {target - offset}"
        reason = f"{iterations if offset else 'train_iters'}: the run is done when it is complete"
        yield Decision("checkpoint.last", f"global_step{target}", reason)


def _mode_decisions(modes: tuple[str, ...], override: bool) -> tuple[Decision, ...]:
    finetune = Decision(
        "config.finetune",
        {mode: mode == "finetune" for mode in modes},
        "only the first link from a start checkpoint leaves the optimizer behind",
        "recipe neox-sft",
    )
    schedule = Decision(
        "config.override_lr_scheduler",
        {"resume": True},
        "a resume takes the schedule from the config; else any change of it stops NeoX"
        " (learning_rates.py:114-147)",
        "recipe neox-sft",
    )
    return (finetune, schedule) if override else (finetune,)


def _export_decision(exporting: dict[str, Any]) -> Decision:
    reason = (
        exporting["refused"]
        or "the Hugging Face class that NeoX's converter fills with this norm, activation "
        "and positions"
    )
    return Decision("export.architecture", exporting["architecture"], reason, "recipe neox-sft")


def _files(starter: str, exporting: dict[str, Any]) -> dict[str, str]:
    names = ["neox_args.py"] if starter == launch.SRUN else []
    names += [] if exporting["refused"] else ["finish_export.py"]
    return {name: shipped_text("neox-sft", name) for name in names}
