"""Reads everything a run names and makes its plan: the one way from a run.yaml on disk to a
Plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpctrain.base.errors import HpctrainError, Problem, UsageError
from hpctrain.base.text import text_problem
from hpctrain.config.document import Document, load_yaml, merge
from hpctrain.config.recipe import Recipe, check_recipe_options, load_recipe
from hpctrain.config.run import (
    Handed,
    RunSpec,
    absolute,
    check_secrets,
    read_layers,
    spec_from_layers,
)
from hpctrain.config.site import Site, layer_name, load_site
from hpctrain.plan.make import Plan, make_plan


@dataclass(frozen=True)
class Loaded:
    """A plan and the bytes of what it was made from (`run.yaml`, `site.yaml`, base configs), by
    name."""

    plan: Plan
    inputs: Mapping[str, bytes]
    # its rendered files, kept by `run_dir.rendered`
    rendered: dict[str, str] = field(default_factory=dict, compare=False)


def load_plan(
    path: str,
    assignments: Sequence[str] = (),
    out_dir: str | None = None,
    overlay: Document | None = None,
    handed: Handed | None = None,
) -> Loaded:
    """Read `path` with its layers, site, recipe and base configs, and plan it.

    `overlay` and `handed` are a pipeline's: values laid over run.yaml, and what the earlier stage
    hands over. The run directory is `out_dir`, or `runs/<name>` beside run.yaml. The plan may hold
    errors: see `Plan.errors`. Raises UsageError or EnvironmentFault, with every problem that could
    be found.
    """
    layers = read_layers(path, assignments, overlay)
    merged = merge(layers)
    base_dir = os.path.dirname(os.path.abspath(path))
    problems: list[Problem] = []
    site = recipe = None
    try:
        site = (
            load_site(_text(merged, "site"), base_dir, merged.where("site"))
            if _text(merged, "site")
            else None
        )
    except HpctrainError as error:
        problems += error.problems
    try:
        recipe = (
            load_recipe(_text(merged, "recipe"), merged.where("recipe"), base_dir)
            if _text(merged, "recipe")
            else None
        )
    except HpctrainError as error:
        problems += error.problems
    if site and site.values["defaults"]:
        layers.insert(0, site.document.section("defaults"))
    spec, spec_problems = spec_from_layers(layers, path, handed)
    problems = [*spec_problems, *problems]
    if not site or not recipe:
        problems += check_recipe_options(recipe, spec.document)[1] if recipe else []
        raise UsageError(problems)
    inputs: dict[str, bytes] = {"run.yaml": _read(path), "site.yaml": _site_bytes(site)}
    documents, option_problems = _read_options(spec, recipe, inputs)
    problems += option_problems
    run_dir = os.path.abspath(out_dir) if out_dir else os.path.join(base_dir, "runs", spec.name)
    _check_folders(run_dir, base_dir)
    return Loaded(make_plan(spec, site, recipe, run_dir, documents, problems), inputs)


def _check_folders(run_dir: str, base_dir: str) -> None:
    """Refuse folders whose paths no job script can carry; paths in run.yaml are taken from the
    folder it lies in."""
    problems = []
    if "\\" in run_dir:
        what = (
            f"the run directory {run_dir!r} has a backslash in its path, which Slurm's file name"
            " patterns cannot carry"
        )
        problems.append(Problem(what, hint="name another one with -o"))
    for what, folder, hint in (
        ("the run directory", run_dir, "name another one with -o"),
        ("the folder of run.yaml", base_dir, "put it into a folder with a plain name"),
    ):
        found = text_problem(folder)
        if found and not problems:
            problems.append(
                Problem(
                    f"{what} {folder!r} cannot be written into a job script: its path {found}",
                    hint=hint,
                )
            )
    if problems:
        raise UsageError(problems)


def _text(document: Document, key: str) -> str:
    value = document.get(key)
    return value if isinstance(value, str) and value.isprintable() else ""


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_options(
    spec: RunSpec, recipe: Recipe, inputs: dict[str, bytes]
) -> tuple[dict[str, tuple[Document, ...]], list[Problem]]:
    """The YAML documents of the options that the recipe declares `reads: yaml`, and the problems of
    all files."""
    documents: dict[str, tuple[Document, ...]] = {}
    problems: list[Problem] = []
    for option, declared in recipe.values["options"].items():
        if declared["reads"] != "yaml":
            continue
        value = spec.recipe_options.get(option, declared["default"])
        listed = value if isinstance(value, list) else []
        names = [value] if isinstance(value, str) else listed
        found = []
        for index, name in enumerate(names):
            if not isinstance(name, str):
                continue  # its type is reported with the other options
            try:
                full = absolute(name, spec.base_dir)
                document = load_yaml(full, name=name)
                check_secrets(document)
                found.append(document)
                inputs[f"{option}[{index}]"] = _read(full)
            except HpctrainError as error:
                problems += [
                    Problem(
                        f"`recipe_options.{option}`: {problem.what}",
                        where=(
                            f"{problem.where} (named at"
                            f" {spec.where('recipe_options', option, index)})"
                        ),
                        why=problem.why,
                        hint=problem.hint or "paths are relative to run.yaml",
                    )
                    for problem in error.problems
                ]
        documents[option] = tuple(found)
    return documents, problems


def site_yaml(site: Site) -> str:
    """The effective profile as one YAML file, as the run directory keeps it."""
    return _site_bytes(site).decode("utf-8")


def _site_bytes(site: Site) -> bytes:
    """The profile as one file: the very file, or the merged layers when it extends another one."""
    if site.document.raw:
        return site.document.raw
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    head = f"# merged from {', '.join(map(layer_name, site.files))}\n"
    text: str = yaml.dump(
        site.document.data, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120
    )
    return (head + text).encode("utf-8")
