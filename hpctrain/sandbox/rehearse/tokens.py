"""Rehearses a tokenization: its very array, on the head of its data, against a real Slurm shaped
like the site.

The array of `hpctrain tokenize` is submitted by the same code with the same options; only the
inputs are replaced by their first records, and the output goes to a folder that is deleted. What it
made is held against what one local process makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpctrain.base.errors import HpctrainError, Problem, UsageError
from hpctrain.base.files import sha256_of
from hpctrain.config.site import Site, load_site
from hpctrain.data.command import How, tokenize
from hpctrain.data.limits import limits_of
from hpctrain.data.prepare import Request, prepare
from hpctrain.data.present import outcome_json
from hpctrain.data.sources import Input, Segment, SegmentReader
from hpctrain.sandbox.from_site import shape_from_site
from hpctrain.sandbox.rehearse import remote, stage
from hpctrain.sandbox.shape import ClusterShape

SAMPLE_BYTES = 256 << 10  # of each input, and no less than
BYTES_PER_TASK = 8 << 10
NUM_NODES = 2
TASKS_PER_CORE = 3  # that run at once: this machine is not the site


@dataclass(frozen=True)
class TokensOutcome:
    """What the rehearsal told. `states` counts the array's tasks and the merge by Slurm's state at
    their end."""

    problems: tuple[Problem, ...]
    site: str
    partition: str
    answer: Mapping[str, Any]
    states: Mapping[str, int]
    sample_bytes: int
    same_bytes: bool
    seconds: Mapping[str, float]

    @property
    def ok(self) -> bool:
        return not any(problem.level == "error" for problem in self.problems)


def rehearse_tokens(
    request: Request,
    how: How,
    environ: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> TokensOutcome:
    """Play it and take everything down again. Raises UsageError for options that are wrong anyway,
    EnvironmentFault where this machine cannot."""
    if not how.site:
        raise UsageError(
            "a rehearsal needs to know the site", where="--site", hint="for example --site lumi"
        )
    site = load_site(how.site)
    partition = limits_of(site, how.partition).partition or ""
    sources = prepare(replace(request, force=True)).plan.inputs
    clock, seconds = time.monotonic(), {}
    with (
        stage.place_of(os.path.abspath(request.output_prefix), "", environ, False) as place,
        stage.enough_space(place, NUM_NODES, True),
    ):
        place.files.mkdir()
        inputs = _samples(
            sources,
            max(SAMPLE_BYTES, BYTES_PER_TASK * request.tasks // len(sources)),
            place.files / "in",
        )
        mounts = _mounts(site, how.container, place.files)
        shape = shape_of(site, how, mounts)
        record = stage.start(place, shape, environ, progress)
        seconds["sandbox"] = time.monotonic() - clock
        login = stage.Login(record, place, environ.get("HOME", "/"), environ)
        sample = replace(
            request,
            inputs=tuple(inputs),
            output_prefix=str(place.files / "array" / "out"),
            force=False,
        )
        progress("array", 0, 0)
        for name in ("array", "alone"):
            (place.files / name).mkdir()
        array = replace(how, engine="array", scan="none", wait=True)
        answer = remote.call(login, submit, sample, array)
        states = Counter(state for state, _ in login.tasks().values())
        seconds["jobs"] = time.monotonic() - clock - seconds["sandbox"]
        own = {path: source.path for path, source in zip(inputs, sources)}
        problems = [_of_the_data(Problem(**fields), own) for fields in answer.get("problems", ())]
        told = [problem for problem in problems if problem.where.startswith(tuple(own.values()))]
        problems = told or problems  # the rest follows from these
        same = False
        if not problems:
            with contextlib.redirect_stdout(sys.stderr):
                alone = replace(sample, output_prefix=str(place.files / "alone" / "out"), tasks=1)
                local = tokenize(
                    alone, How(engine="local", processes=1, scan="none"), _quiet, _quiet, _quiet
                )
            same = _digests(answer["dataset"]) == _digests(local.plan.dataset)
            problems = (
                []
                if same
                else [
                    Problem("the array made another dataset than one process", where=str(partition))
                ]
            )
        seconds["all"] = time.monotonic() - clock
        sample_bytes = sum(os.path.getsize(path) for path in inputs)
    return TokensOutcome(
        tuple(problems), site.name, partition, answer, states, sample_bytes, same, seconds
    )


def shape_of(site: Site, how: How, mounts: Sequence[tuple[str, str]]) -> ClusterShape:
    """The site with a few nodes of the partition's kind. Fewer tasks run at once than there: each
    is a whole Python."""
    name = limits_of(site, how.partition).partition
    found = site.partition(name) if name else None
    kinds = {part.node_type.name for part in site.partitions.values()}
    counts = {kind: 0 for kind in kinds}
    counts[found.node_type.name if found else next(iter(site.node_types))] = NUM_NODES
    accounts = (how.account,) if how.account else ()
    shape = shape_from_site(
        site,
        counts,
        accounting=True,
        accounts=accounts,
        mounts=mounts,
        kill_wait_s=5,
        lean=True,
        partitions=[name] if name else [],
    )
    at_once = TASKS_PER_CORE * (os.cpu_count() or 1)
    parts = tuple(
        replace(part, max_running=min(part.max_running or at_once, at_once))
        for part in shape.partitions
    )
    return replace(shape, partitions=parts)


def lines(outcome: TokensOutcome) -> list[str]:
    """What goes to standard output."""
    answer = outcome.answer
    where = f"{outcome.partition or 'the default partition'} of {outcome.site}"
    shards = (
        f"{answer['array_tasks']} array tasks for {answer['shards']} shards on "
        if "shards" in answer
        else ""
    )
    out = [shards + where]
    if outcome.states:
        out.append(
            "jobs: "
            + ", ".join(
                f"{count} {state.lower()}" for state, count in sorted(outcome.states.items())
            )
        )
    manifest = answer.get("manifest") or {}
    if outcome.same_bytes:
        out.append(
            f"{manifest.get('documents', 0):,} documents of the head of the data, byte for byte as"
            " from one process"
        )
    bad = [problem for problem in outcome.problems if problem.level == "error"]
    return [*out, f"{len(bad)} thing{'s' * (len(bad) > 1)} would go wrong" if bad else "all right"]


def as_json(outcome: TokensOutcome) -> dict[str, Any]:
    """The whole answer as plain data."""
    return {
        "ok": outcome.ok,
        "site": outcome.site,
        "partition": outcome.partition or None,
        "array_tasks": outcome.answer.get("array_tasks"),
        "shards": outcome.answer.get("shards"),
        "states": dict(outcome.states),
        "same_bytes": outcome.same_bytes,
        "documents": (outcome.answer.get("manifest") or {}).get("documents"),
        "sample_bytes": outcome.sample_bytes,
        "problems": [problem.as_json() for problem in outcome.problems],
        "seconds": dict(outcome.seconds),
    }


def _samples(sources: Sequence[Input], num_bytes: int, folder: Path) -> list[str]:
    """The first records of each input, about `num_bytes` of them, as files of lines."""
    paths = []
    for number, source in enumerate(sources):
        path = folder / f"{number:03d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as stream:
            reader = SegmentReader(source, Segment(number, 0, source.units), hashlib.sha256())
            for block in reader.blocks():
                for item in block.records:
                    stream.write(
                        (item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n"
                    )
                    if stream.tell() >= num_bytes:
                        break
                if stream.tell() >= num_bytes:
                    break
        paths.append(str(path))
    return paths


def _mounts(site: Site, image: str | None, files: Path) -> list[tuple[str, str]]:
    """Made-up folders for what a container binds and this machine lacks, and for the image
    itself."""
    if not image:
        return []
    image = os.path.abspath(image)
    wanted = [bind.split(":")[0] for bind in site.values["container"]["binds"]]
    if not os.path.exists(image):
        wanted.append(os.path.dirname(image))
    missing = sorted({path for path in wanted if not os.path.exists(path)})
    tops = [path for path in missing if not any(path.startswith(other + "/") for other in missing)]
    mounts = []
    for number, target in enumerate(tops):
        source = files / f"site-{number:02d}"
        source.mkdir()
        mounts.append((str(source), target))
        for path in [path for path in missing if path.startswith(target + "/")]:
            (source / os.path.relpath(path, target)).mkdir(parents=True, exist_ok=True)
        if image.startswith(target + "/"):
            (source / os.path.relpath(image, target)).touch()
    return mounts


def submit(request: Request, how: How) -> dict[str, Any]:
    """On the login node: run the tokenization and wait for its end; its outcome, or its
    `problems`."""
    try:
        return outcome_json(tokenize(request, how, _quiet, _quiet, _quiet))
    except HpctrainError as error:
        return {"problems": [problem.as_json() for problem in error.problems]}


def _of_the_data(problem: Problem, own: Mapping[str, str]) -> Problem:
    """The problem with the user's file in place of its sample; the lines of both have the same
    numbers."""
    for sample, path in own.items():
        problem = replace(problem, where=problem.where.replace(sample, path))
    return problem


def _digests(dataset: str) -> list[str]:
    return [sha256_of(dataset + end) for end in (".bin", ".idx")]


def _quiet(*words: object) -> None:
    pass
