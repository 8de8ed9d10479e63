"""What the guard is told by `plan.json`, checked."""

import json
import os
from typing import Any, Dict, NamedTuple, Optional, Tuple

from .layout import Expected
from .layouts import LAYOUTS

SCHEMA_VERSION = 1
COUNTERS = ("latest", "greatest_folder")
HAND_OVERS = ("checkpoint", "model", "folder")
WAYS = ("symlink", "copy", "hardlink")
HANDED = "hand_over.json"


class GuardError(Exception):
    """The guard cannot decide; the job must not start."""


class Source(NamedTuple):
    """What this run goes on from, found when its first link starts: the `from` part of the guard.

    `hand_over`: the newest complete `checkpoint` of an earlier stage of a pipeline, or the `model` it leaves at the path
    `model`; `folder`: what the tracker of the checkpoint folder `run_dir` names. `checkpoint`: what the plan expects to be
    handed over, None where the earlier stage does not say how far it goes; with `folder` the checkpoint to take instead.
    """

    stage: str
    run_dir: str
    hand_over: str
    checkpoint: Optional[str] = None
    model: Optional[str] = None


class Settings(NamedTuple):
    """The `guard` part of plan.json.

    `target` is the number in a checkpoint's folder name at which the run is done. `counter` is `greatest_folder` where
    the framework takes its iteration from the greatest `global_step*` in the folder, whatever `latest` says. `retention`:
    the framework itself deletes old checkpoints, which it knows by their names. `exported`: the run is done only when the
    framework has also exported its model into the folder. `source`: the earlier stage that hands over the start; `start`
    is then None until that happened. `start_as`: how a start is brought into the checkpoint folder. `start_needs`: what
    must lie in it, beside what the layout asks for.
    """

    run: str
    layout: str
    checkpoint_dir: Optional[str]
    start: Optional[str]
    expected: Expected
    target: Optional[int]
    give_up_after: int
    after_each: Optional[str]
    quarantine: bool
    counter: str
    retention: bool = False
    exported: bool = False
    source: Optional[Source] = None
    start_as: str = "symlink"
    start_needs: Tuple[str, ...] = ()


def read_settings(run_dir: str) -> Settings:
    """The guard's settings of a run directory; raises GuardError when plan.json is missing or not as it must be.

    What an earlier stage has handed over already is the start.
    """
    path = os.path.join(run_dir, "plan.json")
    try:
        with open(path, "rb") as stream:
            plan = json.loads(stream.read().decode("utf-8"))
        settings = parse_settings(plan["guard"])
        return settings if settings.source is None else settings._replace(start=handed_over(run_dir))
    except OSError as error:
        raise GuardError("cannot read `{}`: {}".format(path, error.strerror)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise GuardError("`{}` is damaged: {}; render the run again".format(path, error)) from error


def handed_over(run_dir: str) -> Optional[str]:
    """The checkpoint that an earlier stage handed to this run, None when that has not happened yet."""
    try:
        with open(os.path.join(run_dir, HANDED), "rb") as stream:
            return _path(json.loads(stream.read().decode("utf-8")), "checkpoint")
    except FileNotFoundError:
        return None


def parse_settings(guard: Dict[str, Any]) -> Settings:
    """Settings from the plan's `guard`; raises ValueError, naming the key, when one is not as it must be."""
    if guard["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            "guard.schema_version is {}, this runtime knows {}".format(guard["schema_version"], SCHEMA_VERSION)
        )
    layout, counter = guard["layout"], guard.get("counter", "latest")
    if layout not in LAYOUTS:
        raise ValueError("guard.layout is `{}`, not one of {}".format(layout, ", ".join(sorted(LAYOUTS))))
    if counter not in COUNTERS:
        raise ValueError("guard.counter is `{}`".format(counter))
    folder = _path(guard, "checkpoint_dir")
    if folder is None and layout != "none":
        raise ValueError("guard.checkpoint_dir is missing, and layout `{}` keeps checkpoints".format(layout))
    way = guard.get("start_as", "symlink")
    if way not in WAYS:
        raise ValueError("guard.start_as is `{}`".format(way))
    ranks = [_count(guard, key) for key in Expected._fields]
    return Settings(
        run=str(guard.get("run", "")),
        layout=layout,
        checkpoint_dir=folder,
        start=_path(guard, "start"),
        expected=Expected(*ranks),
        target=_count(guard, "target"),
        give_up_after=_count(guard, "give_up_after") or 3,
        after_each=_path(guard, "after_each"),
        quarantine=guard.get("quarantine", True) is not False,
        counter=counter,
        retention=guard.get("retention", False) is True,
        exported=guard.get("exported") is True,
        source=_source(guard.get("from")),
        start_as=way,
        start_needs=tuple(map(str, guard.get("start_needs") or ())),
    )


def _source(given: Optional[Dict[str, Any]]) -> Optional[Source]:
    if given is None:
        return None
    run_dir = _path(given, "run_dir")
    if run_dir is None or given.get("hand_over") not in HAND_OVERS:
        raise ValueError("guard.from names no run directory, or hands over `{}`".format(given.get("hand_over")))
    return Source(str(given["stage"]), run_dir, given["hand_over"], _path(given, "checkpoint"), _path(given, "model"))


def _count(guard: Dict[str, Any], key: str) -> Optional[int]:
    value = guard.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError("guard.{} is `{}`, not a whole number".format(key, value))
    return value


def _path(guard: Dict[str, Any], key: str) -> Optional[str]:
    value = guard.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not os.path.isabs(value) or "\0" in value:
        raise ValueError("guard.{} is not an absolute path".format(key))
    # Python 3.6 in the C locale takes file names for ASCII: carry the bytes of the path through.
    return os.path.normpath(os.fsdecode(value.encode("utf-8", "surrogateescape")))
