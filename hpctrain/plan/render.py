"""Plan -> {path: text}. Pure and deterministic: the same plan gives the same bytes, wherever it is
rendered."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpctrain import __version__, runtime
from hpctrain.base.errors import HpctrainError, Problem, UsageError
from hpctrain.base.paths import layer_dirs, shipped_dir, shipped_text
from hpctrain.base.shell import (
    ShellText,
    comment,
    node_path,
    quote,
    quote_all,
    sbatch_value,
    script,
)
from hpctrain.config.sbatch import agreeing_inputs, inherited_inputs
from hpctrain.config.site import layer_name
from hpctrain.config.trust import require_trust
from hpctrain.plan.make import Plan
from hpctrain.plan.template_lint import lint_template

_JOB = "job.sbatch"
_EXPORT = "export.sbatch"  # where the recipe has such a template and its `resolve` says how
_OVERRIDE = " (an override)"
_EXTENDS = re.compile(r"""\{%-?\s*extends\s+["']([^"']+)["']""")


def render(
    plan: Plan, inputs: Mapping[str, bytes], compiled: jinja2.BytecodeCache | None = None
) -> dict[str, str]:
    """The files of the run directory by name, without `runtime/`. `inputs`: name -> bytes of what
    the plan was made from.

    `compiled` keeps what compiling the templates gives; the files are the same with and without it.

    Raises UsageError when a template is not valid or a value cannot be carried, Refused when a
    template or the profile could be somebody else's.
    """
    plan.site.check_trust()
    files = dict(plan.resolved.configs)
    files.update(plan.resolved.files)
    if plan.preflight:
        files["measure_nodes.py"] = shipped_text("base", "measure_nodes.py")
    job = template_name(make_environment(plan.spec.base_dir), plan.recipe.name)
    asked = {directive.option: directive.value for directive in plan.directives}
    files[_JOB] = _render_script(plan, inputs, job, compiled, asked)
    exporting = plan.resolved.template.get("export")
    if exporting and not exporting["refused"]:
        asked = {directive["option"]: directive["value"] for directive in exporting["directives"]}
        name = f"{plan.recipe.name}/{_EXPORT}.j2"
        files[_EXPORT] = _render_script(plan, inputs, name, compiled, asked)
    files["plan.json"] = _json(plan_json(plan, inputs))
    return files


def _render_script(
    plan: Plan,
    inputs: Mapping[str, bytes],
    name: str,
    compiled: jinja2.BytecodeCache | None,
    asked: Mapping[str, str],
) -> str:
    """One script, submitted with the options `asked` of sbatch."""
    environment = make_environment(plan.spec.base_dir)
    environment.bytecode_cache = compiled
    used: list[str] = []
    values = plan.site.values
    spec = plan.spec
    needs_cpus = not any(option.option == "cpu-bind" for option in plan.srun_options)
    try:
        used += _chain(environment, name)
        text = environment.get_template(name).render(
            plan=plan,
            run_dir=plan.run_dir,
            version=__version__,
            runtime=sorted(runtime_files(plan)),
            runtime_sha256=_sums(runtime_files(plan)),
            source_name="run.yaml",
            source_sha256=_sha256(inputs.get("run.yaml", b""))[:12],
            templates=", ".join(used),
            modules={**values["modules"], "own": spec.modules},
            setup=script(spec.setup),
            task_setup=spec.task_setup,
            inherited=inherited_inputs(asked),
            as_asked=sorted(agreeing_inputs(asked).items()),
            unset_env=[
                name
                for name in values["unset_env"]
                if name not in {variable.name for variable in plan.env}
            ],
            export_cpus=needs_cpus,
            secrets=_secrets_path(spec.secrets, spec.base_dir) if spec.secrets else None,
            config_for=sorted(plan.resolved.config_for.items()),
            rendezvous_suffix=values["network"]["rendezvous_suffix"],
            port_base=values["network"]["port_base"],
            port_range=values["network"]["port_range"],
            node_dirs=[
                {
                    "name": name,
                    "path": node_path(fields["path"], plan.node_type.tmp_path),
                    "why": fields["why"],
                }
                for name, fields in values["node_dirs"].items()
            ],
            # Others are kept from job to job.
            passing_dirs=[
                name for name, fields in values["node_dirs"].items() if "{job}" in fields["path"]
            ],
            workdir=plan.resolved.workdir or plan.run_dir,
            signals=list(dict.fromkeys([plan.signal["name"], "TERM"])),
            # Of the same container without its GPUs, for a job that needs none.
            cpu_container=[
                word for word in plan.container if word != values["container"]["gpu_flag"]
            ],
            container_runtime=values["container"]["runtime"],
            recipe=plan.resolved.template,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(
            f"template: {error.message}", where=f"{error.filename or error.name}:{error.lineno}"
        ) from error
    except jinja2.TemplateNotFound as error:
        raise UsageError(
            f"template `{name}`: there is no template `{error}`", where=_place(error)
        ) from error
    except jinja2.TemplateError as error:
        raise UsageError(f"template `{name}`: {error}", where=_place(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"template `{name}`, or one that it extends, is not UTF-8 text: {error}"
        ) from error
    except RecursionError as error:
        hint = f'an override extends the shipped one as "!builtin/{name}"'
        raise UsageError(
            f"template `{name}` extends or includes itself", where=_place(error), hint=hint
        ) from error
    except HpctrainError:
        raise
    except Exception as error:
        if not any(used_one.endswith(_OVERRIDE) for used_one in used):
            raise  # a shipped template that fails is a bug of ours
        raise UsageError(
            f"template `{name}`: {type(error).__name__}: {error}", where=_place(error)
        ) from error
    if not text.startswith("#!"):
        hint = f'an override extends the shipped one: {{% extends "!builtin/{name}" %}}'
        raise UsageError(
            f"template `{name}` gives no script: the first line is not `#!`", hint=hint
        )
    return text


def _place(error: BaseException) -> str:
    """`file:line` of the template where rendering failed; Jinja puts the templates' own lines into
    the traceback."""
    place, trace = "", error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        place = f"{file}:{trace.tb_lineno}" if file.endswith(".j2") else place
        trace = trace.tb_next
    return place


def make_environment(base_dir: str = "") -> jinja2.Environment:
    """The Jinja environment of all templates.

    Undefined is an error; comments are `{## ##}` because bash has `${#x[@]}`; a user's template of
    the same name shadows the shipped one and extends it as `!builtin/<name>`.
    """
    layers = layer_dirs("templates", base_dir)
    folders = tuple(
        folder for label, folder in layers if label != "shipped" and os.path.isdir(folder)
    )
    # A user's templates may change, appear, or be another project's at any time; only the shipped
    # ones are kept compiled.
    return _environment(folders) if folders else _shipped_environment()


@functools.lru_cache(maxsize=1)
def _shipped_environment() -> jinja2.Environment:
    return _environment(())


def _environment(folders: tuple[str, ...]) -> jinja2.Environment:
    shipped = shipped_dir("templates")
    loaders: list[jinja2.BaseLoader] = [_OwnTemplates(folder) for folder in folders]
    loaders += [
        jinja2.PrefixLoader({"!builtin": jinja2.FileSystemLoader(shipped)}),
        jinja2.FileSystemLoader(shipped),
    ]
    environment = (_Sandboxed if folders else _Linted)(
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",
        comment_end_string="##}",
        autoescape=False,
        auto_reload=True,
        # folding constants takes longer than it saves for a template that is rendered once
        optimized=False,
    )
    environment.filters.update(
        q=_shell_word, qjoin=quote_all, sbatch=sbatch_value, comment=comment, raw_shell=_raw_shell
    )
    return environment


def runtime_files(plan: Plan) -> Mapping[str, bytes]:
    """What a job runs of hpctrain, by name: the modules of `hpctrain/runtime` and the recipe's."""
    own = {name: text.encode() for name, text in plan.resolved.runtime.items()}
    return {**_guard_files(), **own}


@functools.lru_cache(maxsize=1)
def _guard_files() -> Mapping[str, bytes]:
    folder, found = os.path.dirname(runtime.__file__ or ""), {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
    return found


def _sums(files: Mapping[str, bytes]) -> str:
    """The hash of what `sha256sum` says of the files."""
    lines = (f"{_sha256(files[name])}  {name}\n" for name in sorted(files))
    return _sha256("".join(lines).encode())


def template_name(environment: jinja2.Environment, recipe: str) -> str:
    """The job template of a recipe: its own, or the base one."""
    own = f"{recipe}/{_JOB}.j2"
    try:
        assert environment.loader
        environment.loader.get_source(environment, own)
    except jinja2.TemplateNotFound:
        return f"base/{_JOB}.j2"
    except UnicodeDecodeError:
        pass  # it is there; reading it to render says what is wrong
    return own


def plan_json(plan: Plan, inputs: Mapping[str, bytes]) -> dict[str, Any]:
    """What plan.json holds: the guard's facts, the shape, every decision, and the hashes of what it
    was made from."""
    return {
        "schema_version": 1,
        "hpctrain": __version__,
        "run": plan.spec.name,
        "site": plan.site.name,
        "recipe": plan.recipe.name,
        "guard": plan.guard(),
        "job": {
            "partition": plan.partition.name,
            "account": plan.spec.account,
            "num_nodes": plan.spec.num_nodes,
            "gpus_per_node": plan.gpus_per_node,
            "tasks_per_node": plan.tasks_per_node,
            "cpus_per_task": plan.cpus_per_task,
            "time_s": plan.spec.time_s,
            "num_links": plan.spec.num_links,
            "signal": dict(plan.signal),
            "step_time_s": plan.spec.step_time_s,
            "iterations": plan.resolved.cadence.iterations,
            "save_every": plan.resolved.cadence.save_every,
            "saves_on_signal": plan.resolved.cadence.saves_on_signal,
        },
        "cost": {
            "node_hours": plan.cost.node_hours,
            "gpu_hours": plan.cost.gpu_hours,
            "billed": plan.cost.billed,
            "unit": plan.cost.unit,
            "formula": plan.cost.formula,
        },
        **({"preflight": dict(plan.preflight)} if plan.preflight else {}),
        "decisions": [
            {
                "name": d.name,
                "value": d.value,
                "reason": _portable(d.reason, plan),
                "origin": _portable(d.origin, plan),
            }
            for d in plan.decisions
        ],
        "notes": [_portable_problem(problem, plan) for problem in plan.problems],
        "inputs": {
            name: {"sha256": _sha256(raw), "size": len(raw)} for name, raw in sorted(inputs.items())
        },
    }


class _OwnTemplates(jinja2.FileSystemLoader):
    """Templates that are not shipped: read from anywhere, run only from where I may be the only
    author."""

    def load(
        self,
        environment: jinja2.Environment,
        name: str,
        globals: MutableMapping[str, Any] | None = None,
    ) -> jinja2.Template:
        file = self.get_source(environment, name)[1]
        require_trust(file, "this template")
        return super().load(environment, name, globals)


class _Linted(jinja2.Environment):
    """Refuses templates from which a value could reach a script unquoted."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for line, what in lint_template(tree):
            raise jinja2.TemplateSyntaxError(what, line, name, filename)
        return tree


class _Sandboxed(_Linted, ImmutableSandboxedEnvironment):
    """For templates that are not ours: they reach what they are given, and not Python behind it."""


def _shell_word(value: object) -> ShellText:
    """One shell word; what is shell text already stays as it is."""
    return value if isinstance(value, ShellText) else quote(value)


def _raw_shell(value: object) -> str:
    """A number, or a word of letters, digits, `_` and `-`: the same in quotes, comments and
    commands."""
    text = str(value)
    if isinstance(value, int) or text.replace("-", "_").isidentifier():
        return text
    raise jinja2.TemplateRuntimeError(f"{value!r} is no plain word; use the filter q")


def _chain(environment: jinja2.Environment, name: str) -> list[str]:
    """The template and those it extends, as the header names them."""
    found: dict[str, str] = {}
    while name and name not in found:
        assert environment.loader
        source, file, _ = environment.loader.get_source(environment, name)
        own = file and not file.startswith(shipped_dir("templates") + os.sep)
        found[name] = name + _OVERRIDE if own else name.replace("!builtin/", "")
        extends = _EXTENDS.search(source)
        name = extends[1] if extends else ""
    return list(found.values())


def _secrets_path(path: str, base_dir: str) -> ShellText:
    """The secrets file as the job names it: `~` is the home of whoever the job runs as."""
    if path.startswith("~/"):
        return ShellText('"$HOME"/' + quote(path[2:]))
    return quote(os.path.normpath(os.path.join(base_dir, path)))


def _portable(text: str, plan: Plan) -> str:
    """A text without this machine's paths: the run's file is called run.yaml, wherever it lies, and
    profiles alike."""
    names = {file: layer_name(file) for file in plan.site.files}
    names[plan.spec.source] = "run.yaml"
    for file in filter(None, names):
        text = re.sub(
            rf"(?<![\w/.-]){re.escape(file)}(?=:\d)", names[file].replace("\\", r"\\"), text
        )
    return text


def _portable_problem(problem: Problem, plan: Plan) -> dict[str, str]:
    return {key: _portable(text, plan) for key, text in problem.as_json().items()}


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
