"""Any program of any framework, by any launcher, so that everything works without a recipe of its
own."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.shell import ShellText, expanding_words, one_expanding_word
from hpctrain.base.text import text_problem
from hpctrain.config.decision import Decision
from hpctrain.config.run import absolute
from hpctrain.recipes import launchers
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.facts import Program
from hpctrain.recipes.own_layout import read_layout

_MODES = ("scratch", "finetune", "resume")
_VARIABLE = re.compile(r"\$(?:\{?[A-Za-z_]\w*|\()")


def resolve(context: Context) -> Resolved:
    """The program as its launcher wants it; the run's `config:` as JSON in config.json, the same
    for every mode."""
    spec, options = context.spec, context.options
    program, problems = _program(context)
    launch = _launch(context, program)
    problems += _launch_problems(context)
    layout, own_layout, wrong = read_layout(context)
    problems += [*wrong, *(_layout_problems(context, layout) if not wrong else ())]
    problems += [
        Problem(f"`config` {bad}", where=spec.where("config"))
        for bad in [_config_problem(spec.config)]
        if bad
    ]
    failed = any(problem.level == "error" for problem in problems)
    sizes = _sizes(program) if layout == "megatron" else {}
    workdir = absolute(options["workdir"], spec.base_dir) if options["workdir"] else spec.base_dir
    return Resolved(
        argv=launch.argv if launch.on_node else (*launch.argv, *launch.program),
        on_node=launch.on_node,
        arguments=launch.program if launch.on_node else (),
        workdir=workdir,
        configs={} if failed else {"config.json": _json(spec.config)},
        config_for=dict.fromkeys(_MODES, "config.json"),
        files={} if failed else launch.files,
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
        template={
            "forward_signal": options["signal"],
            "ray": options["launch"] == "ray",
            "expand": options["expand"],
        },
        model=absolute(options["model_dir"], spec.base_dir) if options["model_dir"] else None,
        paths=(("working directory", workdir, spec.where("recipe_options", "workdir")),),
        facts=(_fact(context, program, workdir),),
        decisions=_decisions(context, program, workdir),
        problems=tuple(problems),
    )


def _program(context: Context) -> tuple[tuple[str, ...], list[Problem]]:
    """The words of `program` or `argv`, and what is wrong with them."""
    spec, options = context.spec, context.options
    key = "argv" if options["argv"] and not options["program"] else "program"
    where, given = spec.where("recipe_options", key), options[key]
    if options["argv"] and options["program"]:
        return (), [Problem("`argv` and `program` name the program twice", where, hint="keep one")]
    if not given:
        key = "argv" if spec.document.get("recipe_options", "argv") is not None else key
        what = f"`recipe_options.{key}` is empty"
        return (), [Problem(what, where, hint="name the program: `program: train.py --lr 1e-4`")]
    if isinstance(given, str):
        words, wrong = _text_words(given, options["expand"])
    else:
        words, wrong = _list_words(context, key, given)
    if wrong:
        return (), [Problem(f"`recipe_options.{key}` {wrong}", where)]
    if not words[0]:
        return (), [Problem(f"`recipe_options.{key}` names an empty program", where)]
    return words, list(_literal_variables(words, where))


def _text_words(text: str, expand: bool) -> tuple[tuple[str, ...], str]:
    """The shell words of a text, and why there are none."""
    try:
        words = expanding_words(text) if expand else shlex.split(text)
    except ValueError as error:
        return (), f"is no line of shell words: {error}"
    return tuple(words), "" if words else "is empty"


def _list_words(context: Context, key: str, given: Any) -> tuple[tuple[str, ...], str]:
    """The words of a list: numbers, true and false are written as they stand in run.yaml."""
    if not isinstance(given, list):
        return (), "must be a text or a list of words"
    words: list[str] = []
    for index, word in enumerate(given):
        if not isinstance(word, (str, int, float)):
            return (), f"holds `{word}`, which is no word"
        plain = word
        origin = context.spec.document.origins.get(("recipe_options", key, index))
        if not isinstance(word, str) and origin and origin.written:
            plain = origin.written
        bad = text_problem(str(plain), multiline=True)
        if bad:
            return (), f"holds a word that {bad}"
        words.append(str(plain))
    if context.options["expand"]:
        try:
            return tuple(one_expanding_word(word) if "$" in word else word for word in words), ""
        except ValueError as error:
            return (), f"is no list of shell words: {error}"
    return tuple(words), ""


def _literal_variables(words: Sequence[str], where: str) -> list[Problem]:
    """A `$VARIABLE` that nothing will ever fill in."""
    shells = {"bash", "sh", "zsh", "dash", "ksh"}
    if words[0].rsplit("/", 1)[-1] in shells:
        return []
    found = [word for word in words if not isinstance(word, ShellText) and _VARIABLE.search(word)]
    return [
        Problem(
            f"`{word[:60]}` is passed to the program as it stands",
            where,
            hint="`recipe_options: {expand: true}` lets the job's shell fill it in",
            level="warning",
        )
        for word in found[:1]
    ]


def _launch(context: Context, program: tuple[str, ...]) -> launchers.Launch:
    options, config = context.options, context.options["launch_config"]
    nodes = launchers.Nodes(
        context.num_nodes,
        options["processes_per_node"] or context.gpus_per_node or 1,
        context.gpus_per_node,
        context.node_type.tmp_path,
        context.run_dir,
    )
    if options["argv"] and options["launch"] == "srun":
        return launchers.Launch((), (), program)
    more = [str(word) for word in options["launch_args"]]
    if options["launch"] == "ray":
        more = ["--timeout", str(options["ray_timeout_s"])]
    return launchers.launch(
        options["launch"],
        options["python"],
        program,
        nodes,
        more,
        absolute(config, context.spec.base_dir) if config else None,
    )


def _launch_problems(context: Context) -> list[Problem]:
    """Options that the chosen launcher does not take."""
    options, kind = context.options, context.options["launch"]
    takes = {
        "launch_args": ("torchrun", "accelerate", "deepspeed"),
        "launch_config": ("accelerate",),
        "processes_per_node": ("torchrun", "accelerate", "deepspeed"),
    }
    return [
        Problem(
            f"`{option}` is an option of {', '.join(kinds)}, and `launch` is {kind}",
            context.spec.where("recipe_options", option),
            hint=f"delete it, or choose `launch: {kinds[0]}`",
        )
        for option, kinds in takes.items()
        if options[option] and kind not in kinds
    ]


def _layout_problems(context: Context, layout: str) -> list[Problem]:
    spec, problems = context.spec, []
    if layout != "none" and not spec.checkpoint_dir:
        problems.append(
            Problem(
                f"`layout: {layout}` needs a checkpoint folder",
                where=spec.where("recipe_options", "layout"),
                hint="set `checkpoint: {dir: …}`",
            )
        )
    if spec.num_links > 1 and layout == "none":
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
    return problems


def _fact(context: Context, program: Sequence[str], workdir: str) -> Program:
    """The program as `check` looks for it, with the Python that runs it."""
    spec, options = context.spec, context.options
    key = "program" if options["program"] else "argv"
    where = spec.where("recipe_options", key)
    before: tuple[str, ...] = ()
    if launchers.is_python(program) and not isinstance(program[0], ShellText) and key == "program":
        before = (options["python"],)
    places = [where] * len(program)
    if isinstance(options[key], list):
        places = [spec.where("recipe_options", key, index) for index in range(len(program))]
    words = tuple(map(str, (*before, *program)))
    return Program(words, workdir, where, (*[where] * len(before), *places))


def _decisions(context: Context, program: Sequence[str], workdir: str) -> tuple[Decision, ...]:
    spec, options = context.spec, context.options
    key = "program" if options["program"] else "argv"
    kind = options["launch"]
    starts = {
        "srun": "one process per task",
        "ray": "one Ray over all nodes, and the program once, on the first",
    }.get(kind, f"one a node, each starts the node's processes: {_processes(context)}")
    return (
        Decision(
            "step.program",
            list(map(str, program)),
            f"recipe_options.{key}",
            spec.where("recipe_options", key),
        ),
        Decision(
            "step.launch",
            kind,
            starts,
            spec.where("recipe_options", "launch") if kind != "srun" else "",
        ),
        Decision(
            "step.workdir",
            workdir,
            "recipe_options.workdir" if options["workdir"] else "the folder of run.yaml",
            spec.where("recipe_options", "workdir") if options["workdir"] else "",
        ),
    )


def _processes(context: Context) -> str:
    asked = context.options["processes_per_node"]
    if asked:
        return f"{asked}, as the run says"
    if context.gpus_per_node:
        return f"{context.gpus_per_node}, one per GPU"
    return "1, there are no GPUs"


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


def _json(config: Any) -> str:
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _config_problem(value: Any) -> str:
    if isinstance(value, str):
        return text_problem(value, multiline=True)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return next(filter(None, map(_config_problem, value)), "")
    return ""
