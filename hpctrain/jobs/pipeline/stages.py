"""A pipeline's stages planned: each a run of its own, with what the stage before hands over as its
start or its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.base.errors import HpctrainError, Problem, UsageError
from hpctrain.config.document import Document, load_yaml, merge, parse_set
from hpctrain.config.pipeline import PipelineSpec, Stage, read_pipeline
from hpctrain.config.recipe import load_recipe
from hpctrain.config.run import Handed
from hpctrain.plan.load import Loaded, load_plan
from hpctrain.plan.make import Plan
from hpctrain.runtime.layouts import layout_named


@dataclass(frozen=True)
class Planned:
    """One stage as a run: rendering and queueing it is what `hpctrain chain` does with any run."""

    stage: Stage
    loaded: Loaded

    @property
    def plan(self) -> Plan:
        return self.loaded.plan

    @property
    def run_dir(self) -> str:
        return self.loaded.plan.run_dir


@dataclass(frozen=True)
class Pipeline:
    """Every stage planned, each after the one it is from. `folder` holds the stages' run
    directories and pipeline.json."""

    spec: PipelineSpec
    folder: str
    stages: tuple[Planned, ...]

    @property
    def problems(self) -> list[Problem]:
        return [problem for planned in self.stages for problem in planned.plan.problems]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]


def load_pipeline(
    path: str, assignments: Sequence[str] = (), out_dir: str | None = None
) -> Pipeline:
    """Read and plan `path`; the folder is `out_dir`, or `runs/<name>` beside it. The plans may hold
    errors.

    Raises UsageError with every problem that could be found in the pipeline and the files it names.
    """
    base_dir = os.path.dirname(os.path.abspath(path))
    spec = read_pipeline(path, base_dir, assignments)
    folder = os.path.abspath(out_dir) if out_dir else os.path.join(base_dir, "runs", spec.name)
    planned: dict[str, Planned] = {}
    problems: list[Problem] = list(spec.problems)
    failed: set[str] = {stage.source for stage in spec.stages if stage.source}
    failed -= {stage.name for stage in spec.stages}  # sources that are no stages
    for stage in spec.stages:
        if stage.source in failed:
            failed.add(stage.name)  # its problems would be those of the stage before
            continue
        try:
            earlier = planned[stage.source] if stage.source else None
            planned[stage.name] = plan_stage(stage, folder, earlier)
        except HpctrainError as error:
            failed.add(stage.name)
            problems += error.problems
    problems += _shared(list(planned.values()))
    if problems:
        problems += [problem for found in planned.values() for problem in found.plan.problems]
        raise UsageError(list(dict.fromkeys(problems)))
    return Pipeline(spec, folder, tuple(planned.values()))


def plan_stage(stage: Stage, folder: str, earlier: Planned | None) -> Planned:
    """The stage as a run in `folder`/<stage>. Raises UsageError when nothing can be handed over to
    it."""
    overlay, handed = stage.overlay, None
    if earlier:
        handed = handed_over(stage, earlier.plan)
        if handed.model:
            overlay = merge([overlay, _model_overlay(stage, handed.model)])
    return Planned(
        stage,
        load_plan(
            os.path.relpath(stage.run), (), os.path.join(folder, stage.name), overlay, handed
        ),
    )


def handed_over(stage: Stage, earlier: Plan) -> Handed:
    """What `stage` gets from the run before it, as far as the plan of that run tells. Raises
    UsageError."""
    guard, source = earlier.resolved.guard, stage.source or ""
    folder = earlier.spec.checkpoint_dir
    if stage.hand_over == "model":
        if not earlier.resolved.model:
            raise UsageError(
                f"stage `{source}` leaves no model: recipe `{earlier.recipe.name}` names none",
                where=stage.where,
                hint=(
                    "hand over its checkpoint, or say where the model is to be: config.export_dir"
                    " (recipes `sft` and `hf-sft`), recipe_options.model_dir (recipe `command`)"
                ),
            )
        return Handed(
            source, earlier.run_dir, "model", stage.way, None, folder, earlier.resolved.model
        )
    if guard.layout == "none" or not folder:
        raise UsageError(
            f"stage `{source}` keeps no checkpoints that could be handed over",
            where=stage.where,
            why=f"its layout is {guard.layout}",
            hint="set `recipe_options: {layout: …}` and `checkpoint: {dir: …}` in its run.yaml",
        )
    newest = None
    if guard.target is not None:
        rules = layout_named(guard.layout, guard.own_layout)
        newest = os.path.join(folder, rules.folder_name(guard.target))
    return Handed(source, earlier.run_dir, "checkpoint", stage.way, newest, folder, None)


def _model_overlay(stage: Stage, model: str) -> Document:
    """The model's path under the keys of the run that take it: the stage's `into`, else those of
    its recipe."""
    keys = list(stage.into)
    if not keys:
        name = merge([load_yaml(stage.run, tolerate=True), stage.overlay]).get("recipe")
        keys = list(load_recipe(str(name)).values["takes_model"]) if name else []
    if not keys:
        raise UsageError(
            f"recipe `{name}` does not say which key of its run is the model",
            where=stage.where,
            hint="name it: into: [config.model_name_or_path]",
        )
    layers = [parse_set([f"{key}=null"]) for key in keys]
    return merge([_filled(layer, model) for layer in layers])


def _filled(layer: Document, model: str) -> Document:
    """The layer of one `--set key=null` with the model as its value: a path may hold what YAML
    would read otherwise."""

    def fill(value: object) -> object:
        return (
            {key: fill(child) for key, child in value.items()} if isinstance(value, dict) else model
        )

    return Document(fill(layer.data), layer.origins, layer.key_origins, layer.name)


def _shared(planned: Sequence[Planned]) -> list[Problem]:
    """Stages that would write into each other: the same name, or the same checkpoint folder."""
    problems = []
    for what, key in (("are both called", "name"), ("save into the same folder", "checkpoint_dir")):
        seen: dict[str, str] = {}
        for found in planned:
            value = getattr(found.plan.spec, key)
            other = seen.setdefault(value, found.stage.name) if value else found.stage.name
            if other != found.stage.name:
                hint = "set: {name: …}" if key == "name" else "set: {checkpoint.dir: …}"
                problems.append(
                    Problem(
                        f"stages `{other}` and `{found.stage.name}` {what} `{value}`",
                        where=found.stage.where,
                        hint=f"give one of them another: {hint}",
                    )
                )
    return problems
