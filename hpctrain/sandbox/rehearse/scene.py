"""What a rehearsal shows to the job: which of the site's paths are imitated, and which files are
made up. Pure but `build`."""

from __future__ import annotations

import os
import secrets as random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.paths import shipped_module
from hpctrain.plan.make import Plan
from hpctrain.runtime.survey import start_number

SIDE = "script of `chain.after_each`"
CANARY = "HPCTRAIN_REHEARSAL_SECRET"


@dataclass(frozen=True)
class Made:
    """One thing made up for the job: `kind` is folder, file, checkpoint or secrets; `path` as the
    job sees it."""

    what: str
    path: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """`mounts`: (folder below the scene's own, path of the site). `made` in the order in which it
    is made.

    `home` is the job's HOME. `missing`: paths that are neither here nor could be made up.
    """

    mounts: tuple[tuple[str, str], ...]
    made: tuple[Made, ...]
    home: str
    missing: tuple[tuple[str, str], ...]

    def real_path(self, root: str, path: str) -> str | None:
        """Where on this machine the site's `path` lies, None when it is not imitated."""
        best = max(
            (target for _, target in self.mounts if _inside(path, target)), key=len, default=None
        )
        if best is None:
            return None
        source = next(source for source, target in self.mounts if target == best)
        return os.path.normpath(os.path.join(root, source, os.path.relpath(path, best)))


def _writable(path: str) -> bool:
    return os.access(path, os.W_OK | os.X_OK)


def plan_scenes(
    plans: Sequence[Plan],
    folder: str,
    user: str,
    exists: Any = os.path.exists,
    writable: Any = _writable,
) -> list[Scene]:
    """Decide what the jobs of runs that hand something on to each other must be shown: all have the
    same mounts.

    `folder` holds their run directories. `exists` and `writable` tell of this machine; nothing else
    is looked at.
    """
    targets: list[str] = []
    found = [_look(plan, user, exists, writable, targets) for plan in plans]
    # The run directories last, by themselves: they are the one place that is always somebody's own
    # folder.
    targets = [*targets, *([] if folder in targets else [folder])]
    mounts = tuple(
        (f"{index:02d}-{_plain(target)}", target) for index, target in enumerate(sorted(targets))
    )
    return [Scene(mounts, made, home, missing) for made, home, missing in found]


def _look(
    plan: Plan, user: str, exists: Any, writable: Any, targets: list[str]
) -> tuple[tuple[Made, ...], str, tuple[tuple[str, str], ...]]:
    """What is made up for one run, its home, and what is missing; `targets` gets the paths to be
    imitated."""
    look = _Look(plan, exists, targets)
    home = look.show_storage(user)
    look.show_places(writable)
    look.make_wanted(home)
    return tuple(dict.fromkeys(look.made)), home, tuple(look.missing)


class _Look:
    """What one run's jobs must be shown, put together step by step."""

    def __init__(self, plan: Plan, exists: Any, targets: list[str]) -> None:
        self.plan, self.exists, self.targets = plan, exists, targets
        self.handed = plan.spec.handed.model if plan.spec.handed else None
        self.made: list[Made] = []
        self.missing: list[tuple[str, str]] = []

    def covered(self, path: str) -> bool:
        return any(_inside(path, target) for target in self.targets)

    def show(self, path: str) -> None:
        if path != "/" and not self.covered(path):
            self.targets.append(path)

    def is_handed(self, path: str) -> bool:
        """Whether the stage before makes it."""
        return self.handed is not None and _inside(path, self.handed)

    def make(self, what: str, path: str, kind: str) -> None:
        """Make it up where it is imitated, or has to be; else it is really here, or missing."""
        if self.is_handed(path):
            return
        if not self.covered(path):
            if self.exists(path):
                return
            parent = path if kind in ("folder", "checkpoint") else os.path.dirname(path)
            if self.exists(parent):
                self.missing.append((what, path))
                return
            self.show(parent)
        self.made.append(Made(what, path, kind))

    def show_storage(self, user: str) -> str:
        """The site's file systems; the home folder, also where the site names none."""
        home = f"/home/{user}-rehearsal"
        for name, area in self.plan.site.values["storage"].items():
            path = area["path"].format(user=user, account=self.plan.spec.account or "account")
            above = os.path.normpath(area["path"].split("{")[0])
            self.show(above if above != "/" and not self.exists(above) else path)
            if name == "home":
                home = path
        self.show(home)
        return home

    def show_places(self, writable: Any) -> None:
        """What jobs write to, and what a container binds."""
        plan, spec = self.plan, self.plan.spec
        if not writable(plan.node_type.tmp_path):
            self.show(plan.node_type.tmp_path)
        binds = [*plan.site.values["container"]["binds"], *spec.container_binds]
        for bind in binds if plan.container else ():
            source = bind.split(":")[0]
            if not self.exists(source):
                self.show(source)
        if spec.checkpoint_dir:
            self.show(spec.checkpoint_dir)
        if plan.resolved.model and not self.covered(plan.resolved.model):
            self.show(os.path.dirname(plan.resolved.model))

    def make_wanted(self, home: str) -> None:
        """What the job reads."""
        plan, spec = self.plan, self.plan.spec
        wanted = list(_wanted(plan))
        for what, path in wanted:
            self.make(what, path, _kind(path, [other for _, other in wanted]))
        for path in plan.resolved.placeholders:
            # one that is not covered lies in a folder that is really here
            if self.covered(path) and not self.is_handed(path):
                self.made.append(Made("placeholder", path, "file"))
        if spec.checkpoint_start and not spec.handed:
            kind = "checkpoint" if plan.resolved.guard.layout != "none" else "folder"
            self.make("start checkpoint", spec.checkpoint_start, kind)
        if spec.secrets:
            in_home = spec.secrets.startswith("~/")
            path = os.path.join(home, spec.secrets[2:]) if in_home else spec.secrets
            self.make(
                "secrets file", os.path.normpath(os.path.join(spec.base_dir, path)), "secrets"
            )


def build(scene: Scene, root: str, plan: Plan, files: Mapping[str, bytes], secret: str = "") -> str:
    """Make everything below `root` and return the value of the made-up secret (`secret`, if given).
    Raises EnvironmentFault."""
    secret = secret or random.token_hex(16)
    try:
        for source, _ in scene.mounts:
            os.makedirs(os.path.join(root, source), exist_ok=True)
        _write(scene.real_path(root, scene.home) or root, None)
        for item in scene.made:
            real = scene.real_path(root, item.path)
            assert real is not None
            if item.kind == "checkpoint":
                _checkpoint(real, plan, in_folder=item.path == plan.resolved.guard.start_folder)
            elif item.kind == "folder":
                os.makedirs(real, exist_ok=True)
            elif item.kind == "secrets":
                _write(real, f"{CANARY}={secret}\n".encode())
                os.chmod(real, 0o600)
            else:
                _write(
                    real, plan.resolved.placeholders.get(item.path, "").encode() or _content(item)
                )
        run_dir = scene.real_path(root, plan.run_dir)
        assert run_dir is not None
        for name, content in files.items():
            _write(os.path.join(run_dir, name), content)
        os.makedirs(os.path.join(run_dir, "logs"), exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot build the rehearsal: {error.strerror}", where=str(error.filename or root)
        ) from error
    return secret


def ranks_of(plan: Plan) -> dict[str, int | None]:
    """The numbers of ranks that decide a checkpoint's files; where the recipe does not say, every
    rank is data-parallel."""
    facts = plan.resolved.guard
    world = plan.spec.num_nodes * plan.tasks_per_node
    data = facts.data_parallel or max(
        world // ((facts.tensor_parallel or 1) * max(facts.pipeline_parallel or 1, 1)), 1
    )
    zero = facts.zero_stage
    if zero is None and facts.layout == "deepspeed":
        zero = 1
    return {
        "tensor": facts.tensor_parallel,
        "pipeline": facts.pipeline_parallel,
        "data": data,
        "zero": zero,
    }


def _wanted(plan: Plan) -> list[tuple[str, str]]:
    """(what, path) of every file and folder that the job reads."""
    spec = plan.spec
    found = [("container image", spec.container)] if spec.container else []
    # the recipe reads these as they are, and has names for them
    named = {path for _, path, _ in plan.resolved.paths}
    for kind, prefixes in spec.data.items():
        for prefix in prefixes:
            if prefix in named:
                continue
            ends = ("",) if os.path.splitext(prefix)[1] else (".bin", ".idx")
            found += [(f"{kind} data", prefix + end) for end in ends]
    found += [(what, path) for what, path, _ in plan.resolved.paths]
    if spec.after_each:
        found.append((SIDE, spec.after_each))
    return list({path: (what, path) for what, path in reversed(found)}.values())[::-1]


def _kind(path: str, others: Sequence[str]) -> str:
    holds_others = any(other != path and _inside(other, path) for other in others)
    return "folder" if holds_others or not os.path.splitext(path)[1] else "file"


def _content(item: Made) -> bytes:
    content: bytes = shipped_module("sandbox", "standin").CONTENT
    return b"#!/bin/sh\n" + content if item.what == SIDE else content


def _checkpoint(path: str, plan: Plan, in_folder: bool) -> None:
    """A whole checkpoint in the recipe's layout under the start's own name, of as many ranks as the
    plan has.

    Where the start is another run's folder, one in it, and the tracker that names it.
    """
    facts = plan.resolved.guard
    number = start_step(plan) or _number(os.path.basename(path))
    standin = shipped_module("sandbox", "standin")
    folder, files, tracker = standin.checkpoint_files(facts.layout, number, ranks_of(plan))
    inside = os.path.join(path, folder) if in_folder else path
    for name, content in files:
        _write(os.path.join(inside, name), content)
    if in_folder and tracker:
        _write(os.path.join(path, tracker[0]), tracker[1].encode())


def start_step(plan: Plan) -> int | None:
    """The number of a start that is found in another run's folder; half way to the target where
    only that folder tells."""
    facts = plan.resolved.guard
    if not facts.start_folder:
        return None
    return (
        start_number(facts.start_checkpoint)
        if facts.start_checkpoint
        else (facts.target or 100) // 2
    )


def _number(name: str) -> int:
    digits = "".join(char if char.isdigit() else " " for char in name).split()
    return int(digits[-1]) if digits else 0


def _write(path: str, content: bytes | None) -> None:
    if content is None:
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(content)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _plain(path: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in path.strip("/"))[-40:]
