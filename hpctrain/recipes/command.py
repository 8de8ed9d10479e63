"""The plain recipe: any argv, so that everything works without a framework."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.text import text_problem
from hpctrain.config.decision import Decision
from hpctrain.config.run import absolute
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.facts import Program
from hpctrain.recipes.own_layout import read_layout


def resolve(context: Context) -> Resolved:
    """The argv as given; the run's `config:` as JSON in config.json, the same for every mode."""
    spec, options = context.spec, context.options
    where = spec.where("recipe_options", "argv")
    problems = []
    if not options["argv"]:
        problems.append(
            Problem(
                "`recipe_options.argv` is empty",
                where=where,
                hint="name the program: [python3, train.py]",
            )
        )
    elif options["argv"][0] == "":
        problems.append(Problem("`recipe_options.argv` names an empty program", where=where))
    layout, own_layout, wrong = read_layout(context)
    problems += wrong
    if layout != "none" and not spec.checkpoint_dir:
        problems.append(
            Problem(
                f"`layout: {layout}` needs a checkpoint folder",
                where=spec.where("recipe_options", "layout"),
                hint="set `checkpoint: {dir: …}`",
            )
        )
    if spec.num_links > 1 and layout == "none" and not wrong:
        problems.append(
            Problem(
                f"a chain of {spec.num_links} jobs needs to know the checkpoints, and `layout` is"
                " none",
                where=spec.where("chain", "jobs"),
                hint=(
                    "name whose checkpoints it writes, `recipe_options: {layout: …}`, or describe"
                    " its own: `layout: {pattern: 'ckpt_{iteration}', marker: DONE}` (`hpctrain"
                    " recipe show command`)"
                ),
            )
        )
    problems += [
        Problem(f"`config` {bad}", where=spec.where("config"))
        for bad in [_config_problem(spec.config)]
        if bad
    ]
    sizes = _sizes(options["argv"]) if layout == "megatron" else {}
    workdir = absolute(options["workdir"], spec.base_dir) if options["workdir"] else spec.base_dir
    config = (
        {}
        if problems
        else {
            "config.json": (
                json.dumps(spec.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            )
        }
    )
    return Resolved(
        argv=tuple(options["argv"]),
        workdir=workdir,
        configs=config,
        config_for={mode: "config.json" for mode in ("scratch", "finetune", "resume")},
        guard=Guard(
            layout=layout,
            own_layout=own_layout,
            target=options["target_iteration"],
            tensor_parallel=sizes.get("tensor_parallel"),
            pipeline_parallel=sizes.get("pipeline_parallel"),
            expert_parallel=sizes.get("expert_parallel"),
            start_takes="of which the program takes what it likes",
        ),
        cadence=Cadence(
            options["target_iteration"], options["save_every"], saves_on_signal=options["signal"]
        ),
        template={"forward_signal": options["signal"]},
        model=absolute(options["model_dir"], spec.base_dir) if options["model_dir"] else None,
        paths=(("working directory", workdir, spec.where("recipe_options", "workdir")),),
        facts=(
            Program(
                tuple(options["argv"]),
                workdir,
                where,
                tuple(
                    spec.where("recipe_options", "argv", index)
                    for index in range(len(options["argv"]))
                ),
            ),
        ),
        decisions=(
            Decision("step.argv", list(options["argv"]), "recipe_options.argv", where),
            Decision(
                "step.workdir",
                workdir,
                "recipe_options.workdir" if options["workdir"] else "the folder of run.yaml",
                spec.where("recipe_options", "workdir") if options["workdir"] else "",
            ),
        ),
        problems=tuple(problems),
    )


# Megatron's own (megatron/training/arguments.py): a checkpoint of other sizes may not load.
_SIZES = {
    "tensor_parallel": "--tensor-model-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "expert_parallel": "--expert-model-parallel-size",
}


def _sizes(argv: Sequence[str]) -> dict[str, int]:
    """The sizes among a Megatron program's arguments, the last of each as argparse takes it; what
    is no plain number there is not guessed."""
    words = [part for word in argv for part in word.split("=", 1)]
    found = {}
    for key, option in _SIZES.items():
        places = [place for place, word in enumerate(words[:-1]) if word == option]
        if places and words[places[-1] + 1].isdigit():
            found[key] = int(words[places[-1] + 1])
    return found


def _config_problem(value: Any) -> str:
    if isinstance(value, str):
        return text_problem(value, multiline=True)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return next(filter(None, map(_config_problem, value)), "")
    return ""
