"""What a writer of checkpoints is, for the campaign that damages them."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

Leaves = dict[str, str]  # what a loader restored: the path of each value and a digest of it
Load = Callable[[str, str], Leaves]  # (checkpoint folder's parent, checkpoint's name)

# What torch would import late, in each process again.
COMMON_MODULES = (
    "torch._dynamo",
    "torch.utils.serialization.config",
    "torch.profiler._cupti_monitor",
)


class Writer:
    """A framework that saves checkpoints, and the framework's own code that loads them.

    `write` and `reader` run in forked processes, one per rank, that share one gloo group where
    there are several. A reader builds what a training would build once, and gives the function that
    loads one checkpoint into it: that raises what the framework raises, and gives what was restored
    otherwise. Before each load everything is reset, so that what the framework leaves out in
    silence differs from what was saved.
    """

    name: ClassVar[str] = ""
    layout: ClassVar[str] = ""  # the name of hpctrain's layout for it
    num_ranks: ClassVar[int] = 1  # that save
    num_readers: ClassVar[int] = 1  # that load
    reloads = True  # a reader process may load many checkpoints, one after the other
    steps: ClassVar[tuple[int, ...]] = (2, 4)
    copies: ClassVar[tuple[str, ...]] = ()  # names under which a step is saved once more
    root_name: ClassVar[str] = "ckpt"  # of the folder that holds the checkpoints
    tracker: ClassVar[str | None] = None  # the file beside the checkpoints that names one
    says_its_step: ClassVar[tuple[str, ...]] = ()  # patterns of files that hold their step in plain
    slow: ClassVar[bool] = False  # a load takes a second
    # a file that only this layout asks for: what lacks it is another writer's whole checkpoint
    marker = ""
    resumes = True  # False: what it leaves out on purpose, nobody can go on without
    built = ""  # what of it no framework wrote, but a tree built from its sources
    preload: ClassVar[tuple[str, ...]] = ()  # imported before any process is forked

    @property
    def weight(self) -> int:
        """Its share of the damages: more where loading costs little."""
        if self.slow:
            return 2
        return 10 if self.num_readers == 1 and self.reloads else 3

    def get_ready(self) -> None:
        """What is done once, before any process is forked: each then finds it done."""
        for module in self.preload:
            importlib.import_module(module)

    def folder(self, step: int) -> str:
        """The name of the folder (or file) of a checkpoint."""
        raise NotImplementedError

    def tell(self, root: str, step: int) -> None:
        """Write the tracker beside the checkpoints as the framework does when it has saved
        `step`."""
        if self.tracker:
            with open(os.path.join(root, self.tracker), "w", encoding="utf-8") as stream:
                stream.write(self.tracker_text(step))

    def tracker_text(self, step: int) -> str:
        return self.folder(step)

    def could_be_whole(self, left: set[str]) -> bool:
        """Whether another program of the same framework could have written exactly these files as a
        whole checkpoint.

        Then nothing in the checkpoint tells that one was lost: a scheduler that many programs do
        not have, the state of one rank more.
        """
        return False

    def write(self, root: str, rank: int) -> None:
        """Train a few steps and save a checkpoint at each of `steps` into `root`, as this rank."""
        raise NotImplementedError

    def reader(self, rank: int) -> Load:
        raise NotImplementedError

    def names_step(self, path: str) -> bool:
        """Whether the file (relative to the checkpoint) tells its step in a form that needs no
        framework."""
        return any(re.fullmatch(pattern, path) for pattern in self.says_its_step)


def without_gaps(names: Iterable[str], pattern: str) -> bool:
    """Whether the numbers in the names that match the pattern are 0, 1, 2 … and there is one."""
    found = [re.fullmatch(pattern, name) for name in names]
    numbers = sorted(int(match.group(1)) for match in found if match)
    return bool(numbers) and numbers == list(range(len(numbers)))


def leaves(tree: Any, path: str = "") -> Leaves:
    """Every value in nested dicts, lists and tensors, by its path, as a short digest of its type
    and content."""
    if isinstance(tree, dict):
        items: Iterable[tuple[Any, Any]] = sorted(tree.items(), key=lambda item: str(item[0]))
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {path: digest(tree)}
    found: Leaves = {}
    for key, value in items:
        found.update(leaves(value, f"{path}/{key}"))
    return found


def digest(value: Any) -> str:
    """A tensor by its own bytes (of a sharded one, this rank's part), anything else by its repr."""
    if hasattr(value, "to_local"):
        value = value.to_local()
    if hasattr(value, "detach"):
        import torch

        plain = value.detach().cpu().contiguous()
        text = f"{plain.dtype}{tuple(plain.shape)}".encode()
        return hashlib.sha1(text + plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[
            :12
        ]
    if hasattr(value, "tobytes"):
        return hashlib.sha1(value.tobytes()).hexdigest()[:12]
    return hashlib.sha1(repr(value).encode()).hexdigest()[:12]
