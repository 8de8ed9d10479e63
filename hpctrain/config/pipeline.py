"""pipeline.yaml: the stages of a pipeline in the order in which they can run, all problems at once.
Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import HpctrainError, Problem, UsageError
from hpctrain.config.document import Document, Origin, Path, load_yaml, merge, parse_set
from hpctrain.config.fields import Field, check, nearest
from hpctrain.config.run import absolute
from hpctrain.config.site import NAME

HAND_OVERS = ("checkpoint", "model")
WAYS = ("symlink", "copy", "hardlink")

FIELDS: dict[str, Field] = {
    "schema_version": Field("int", "version of this format", default=1, minimum=1, maximum=1),
    "name": Field(
        "text",
        "the pipeline's name: its folder under runs/",
        required=True,
        pattern=NAME,
        shape="a name",
    ),
    "stages": Field(
        "map",
        "the stages, by name",
        required=True,
        keys=NAME,
        items=Field(
            "table",
            "one run of the pipeline",
            fields={
                "run": Field("path", "the stage's run.yaml", required=True),
                "set": Field(
                    "map",
                    "values laid over that run.yaml; dotted keys are allowed",
                    items=Field("any", "any value"),
                ),
                "from": Field(
                    "text",
                    "the stage that hands over to this one; omitted: it begins by itself",
                    pattern=NAME,
                    shape="a stage's name",
                ),
                "hand_over": Field(
                    "text",
                    "what it gets: the newest complete checkpoint, or the exported model",
                    choices=HAND_OVERS,
                    default="checkpoint",
                ),
                "as": Field(
                    "text",
                    "how a checkpoint is brought into the stage's folder",
                    choices=WAYS,
                    default="symlink",
                ),
                "into": Field(
                    "list",
                    "keys of the run that get the model's path [default: those that its recipe"
                    " names]",
                    items=Field("text", "a dotted key, e.g. config.model_name_or_path"),
                ),
                "jobs": Field(
                    "int",
                    "links of the stage [default: the run's `chain.jobs`]",
                    minimum=1,
                    maximum=1000,
                ),
            },
        ),
    ),
}


@dataclass(frozen=True)
class Stage:
    """One checked stage. `run` is the absolute path of its run.yaml; `overlay` what is laid over
    it."""

    name: str
    run: str
    source: str | None
    hand_over: str
    way: str
    into: tuple[str, ...]
    overlay: Document
    where: str


@dataclass(frozen=True)
class PipelineSpec:
    """A checked pipeline.yaml; every stage comes after the one it is from."""

    name: str
    stages: tuple[Stage, ...]
    path: str
    raw: bytes
    problems: tuple[Problem, ...] = ()


def is_pipeline(path: str) -> bool:
    """Whether the file is a pipeline.yaml; False for one that cannot be read, which says so where
    it is needed."""
    try:
        return isinstance(load_yaml(path, tolerate=True).get("stages"), dict)
    except HpctrainError:
        return False


def read_pipeline(path: str, base_dir: str, assignments: Sequence[str] = ()) -> PipelineSpec:
    """The pipeline of that file. `assignments` are `STAGE.key.path=value`. With `problems` it is
    a best guess, good for finding more of them. Raises UsageError, with every problem, where its
    stages cannot be told."""
    document = load_yaml(path, tolerate=True)
    if not isinstance(document.data, dict):
        raise UsageError(
            "a pipeline.yaml is a mapping with `name` and `stages`",
            where=path,
            hint="see docs/pipelines.md",
        )
    values, problems = check(document, FIELDS)
    problems = [*document.problems, *problems]
    stages: Mapping[str, Any] = values["stages"] if isinstance(values["stages"], dict) else {}
    if not stages and not problems:
        problems.append(Problem("the pipeline has no stages", where=document.where("stages")))
    overrides, found = _assigned(assignments, stages)
    problems += found
    out = []
    for name, fields in stages.items():
        where = document.where("stages", name)
        overlay, wrong = _overlay(document, name, fields)
        problems += wrong
        problems += _contradictions(document, name, fields)
        out.append(
            Stage(
                name,
                absolute(fields.get("run") or "", base_dir),
                fields.get("from"),
                fields.get("hand_over") or "checkpoint",
                fields.get("as") or "symlink",
                tuple(fields.get("into") or ()),
                merge([overlay, *overrides.get(name, ())]),
                where,
            )
        )
    problems += _unknown_sources(document, out)
    ordered, circle = _in_order(out)
    if circle:
        named = ", ".join(f"`{name}`" for name in circle)
        what = (
            f"stages {named} wait for each other"
            if circle[1:]
            else f"stage {named} waits for itself"
        )
        problems.append(Problem(what, where=document.where("stages", circle[0], "from")))
    if circle or not ordered:
        raise UsageError(problems)
    name = values["name"] or "unnamed"
    return PipelineSpec(name, tuple(ordered), path, document.raw, tuple(problems))


def _overlay(
    document: Document, name: str, fields: Mapping[str, Any]
) -> tuple[Document, list[Problem]]:
    """The stage's `set` and `jobs` as a layer over its run.yaml, with their positions; `a.b: 1` is
    `a: {b: 1}`."""
    data: dict[str, Any] = {}
    origins: dict[Path, Origin] = {}
    problems = []
    prefix: Path = ("stages", name, "set")
    given = {(key,): value for key, value in (fields.get("set") or {}).items()}
    entries: list[tuple[Path, Any, Path]] = [
        (key, value, prefix + key) for key, value in given.items()
    ]
    if fields.get("jobs"):
        entries.append((("chain", "jobs"), fields["jobs"], ("stages", name, "jobs")))
    for key, value, at in entries:
        path = tuple(part for word in key for part in str(word).split("."))
        if not all(path):
            problems.append(
                Problem(
                    f"`{'.'.join(map(str, key))}` is not a dotted key", where=document.where(*at)
                )
            )
            continue
        node = data
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                problems.append(
                    Problem(
                        f"`{'.'.join(path)}` contradicts another value", where=document.where(*at)
                    )
                )
                break
        else:
            present = node.get(path[-1])
            if isinstance(present, dict) and isinstance(value, dict):
                present.update(value)
            else:
                node[path[-1]] = value
            for place, origin in document.origins.items():
                if place[: len(at)] == at:
                    origins[path + place[len(at) :]] = origin
            for length in range(1, len(path)):
                origins.setdefault(path[:length], document.origins.get(at, Origin(document.name)))
    return Document(data, origins, dict(origins), document.name), problems


def _contradictions(document: Document, name: str, fields: Mapping[str, Any]) -> Iterator[Problem]:
    given = document.get("stages", name, default={})
    if not isinstance(given, dict):
        return  # said already
    for key in ("hand_over", "as", "into"):
        if key in given and not fields.get("from"):
            yield Problem(
                f"`{key}` without `from`: no stage hands anything to `{name}`",
                where=document.where("stages", name, key),
                hint="name the stage that does",
            )
    if "as" in given and fields.get("hand_over") == "model":
        yield Problem(
            "`as` is about checkpoints; a model is used where it lies",
            where=document.where("stages", name, "as"),
            hint="delete it",
        )
    if "into" in given and fields.get("hand_over") != "model":
        yield Problem(
            "`into` is about models; a checkpoint becomes the run's start",
            where=document.where("stages", name, "into"),
            hint="delete it, or set `hand_over: model`",
        )


def _unknown_sources(document: Document, stages: Sequence[Stage]) -> Iterator[Problem]:
    names = [stage.name for stage in stages]
    for stage in stages:
        if stage.source is not None and stage.source not in names:
            yield Problem(
                f"there is no stage `{stage.source}`",
                where=document.where("stages", stage.name, "from"),
                hint=nearest(stage.source, names),
            )


def _in_order(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages, each after the one it is from and else as written; and those that wait for each
    other."""
    ordered: list[Stage] = []
    left = list(stages)
    known = {stage.name for stage in stages}
    while left:
        done = {stage.name for stage in ordered}
        ready = next(
            (s for s in left if s.source is None or s.source in done or s.source not in known), None
        )
        if ready is None:
            return ordered, [stage.name for stage in left]
        ordered.append(ready)
        left.remove(ready)
    return ordered, []


def _assigned(
    assignments: Sequence[str], stages: Mapping[str, Any]
) -> tuple[dict[str, list[Document]], list[Problem]]:
    by_stage: dict[str, list[Document]] = {}
    problems = []
    for text in assignments:
        stage, dot, rest = text.partition(".")
        if not dot or stage not in stages:
            problems.append(
                Problem(
                    f"`--set {text}` does not begin with a stage's name",
                    hint=f"--set {next(iter(stages), 'STAGE')}.key=value",
                )
            )
            continue
        try:
            by_stage.setdefault(stage, []).append(parse_set([rest]))
        except UsageError as error:
            problems += error.problems
    return by_stage, problems
