"""Writes checkpoints as several frameworks do, one write at a time, for the stand-in trainer.

Stdlib only. Each file says its step and its *lineage*, see `checkpoints`. Where a framework's ranks
wait for each other, the writes of each rank say `barrier`; once all that a rank contributes to a
whole checkpoint is there, the write says `whole`. A tracker is truncated before it is written.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import checkpoints

Values = dict[str, Any]


class Metadata:
    """torch.distributed.checkpoint's index."""

    def __init__(self, storage_data: dict[Any, Any]) -> None:
        self.storage_data = storage_data


class _StorageInfo:
    def __init__(self, relative_path: str, offset: int, length: int) -> None:
        self.relative_path, self.offset, self.length = relative_path, offset, length


class Saves:
    """How one framework saves; subclasses say what each rank writes."""

    name = ""
    layout: Any = None  # as run.yaml has it, where that is not the name
    folder = "step-{}"
    tracker: str | None = None
    by_link = False  # a start is brought into the checkpoint folder

    def shards(self, rank: int, world: int) -> list[str]:
        """The files that a rank writes, in its order."""
        raise NotImplementedError

    def last(self) -> list[str]:
        """What rank 0 writes when all have written their shards."""
        return []

    def content(self, name: str, values: Values, world: int) -> bytes:
        return checkpoints.torch_file(values)

    def tracker_text(self, step: int) -> str:
        return str(step)

    def folder_of(self, step: int) -> str:
        return self.folder.format(step)

    def number(self, name: str) -> int | None:
        pattern = re.escape(self.folder).replace(r"\{\}", r"(\d+)").replace(r"\{:07d\}", r"(\d{7})")
        match = re.fullmatch(pattern, name)
        return int(match.group(1)) if match else None

    def writes(
        self, folder: str, step: int, rank: int, world: int, lineage: str, optimizer_steps: int
    ) -> Iterator[str]:
        """Does one write of one rank's part of a save each time it is advanced."""
        path = os.path.join(folder, self.folder_of(step))
        values = {"step": step, "lineage": lineage, "optimizer_steps": optimizer_steps}
        shards, last = self.shards(rank, world), [] if rank else self.last()
        for name in [*shards, "barrier", *last]:
            if name == "barrier":
                yield name
                continue
            ends = name == (last or shards)[-1]
            content = self.content(name, values, world)
            yield from written(os.path.join(path, name), content, "whole" if ends else "wrote")
        if self.tracker and not rank:
            with open(os.path.join(folder, self.tracker), "w") as stream:
                yield "truncate " + self.tracker
                stream.write(self.tracker_text(step))
            yield self.tracker

    def num_writes(self, rank: int, world: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return sum(1 for _ in self.writes(folder, 1, rank, world, "a", 1))

    def save(self, folder: str, step: int, world: int, lineage: str) -> str:
        """A whole save by all ranks, without a tracker; returns its path."""
        for rank in reversed(range(world)):
            for _ in self.writes(folder, step, rank, world, lineage, step):
                pass
        if self.tracker:
            os.unlink(os.path.join(folder, self.tracker))
        return os.path.join(folder, self.folder_of(step))

    def next_one(self, folder: str) -> str | None:
        """The checkpoint that the framework loads by itself: the one that the tracker names, else
        the greatest."""
        if not self.tracker:
            return self.greatest(folder)
        try:
            with open(os.path.join(folder, self.tracker)) as stream:
                text = stream.read().strip()
        except FileNotFoundError:
            return None
        return self.folder_of(int(text)) if text.isdigit() else text

    def greatest(self, folder: str) -> str | None:
        made = [
            (number, name)
            for name in os.listdir(folder)
            if not os.path.islink(os.path.join(folder, name))
            for number in [self.number(name)]
            if number is not None
        ]
        return max(made)[1] if made else None


class DeepSpeed(Saves):
    """Rank 0 names the checkpoint in `latest` without waiting for the others."""

    name = "deepspeed"
    folder = "global_step{}"
    tracker = "latest"
    by_link = True

    def __init__(self, tensor_parallel: int = 2) -> None:
        self.tp = tensor_parallel

    def writes(
        self, folder: str, step: int, rank: int, world: int, lineage: str, optimizer_steps: int
    ) -> Iterator[str]:
        inner = checkpoints.rank_writes(
            folder,
            step,
            rank,
            self.tp,
            world // self.tp,
            1,
            lineage,
            optimizer_steps=optimizer_steps,
        )
        ours = 3 * len(checkpoints.shard_names(rank, self.tp, world // self.tp))
        for number, what in enumerate(inner, 1):
            yield "whole" if number == ours else what

    def tracker_text(self, step: int) -> str:
        return self.folder_of(step)

    def save(self, folder: str, step: int, world: int, lineage: str) -> str:
        return str(
            checkpoints.save(
                folder,
                step,
                self.tp,
                world // self.tp,
                lineage=lineage,
                name=f"_global_step{step}_backup",
            )
        )


class Dcp(Saves):
    """torch.distributed.checkpoint: `.metadata` by rename when all have written."""

    name = "dcp"
    beside: tuple[str, ...] = ()

    def shards(self, rank: int, world: int) -> list[str]:
        return [f"__{rank}_{part}.distcp" for part in range(2)]

    def last(self) -> list[str]:
        return [".metadata"]

    def content(self, name: str, values: Values, world: int) -> bytes:
        if name != ".metadata":
            return super().content(name, values, world)
        names = [name for rank in range(world) for name in self.shards(rank, world)]
        names = [name for name in names if name.endswith(".distcp")]
        length = len(super().content("", values, world))
        return pickle.dumps(self.index({name: _StorageInfo(name, 0, length) for name in names}))

    def index(self, storage: dict[Any, Any]) -> Metadata:
        return Metadata(storage)


class Megatron(Dcp):
    """Megatron's torch_dist: `common.pt` first, `metadata.json` last, then the tracker."""

    name = "megatron"
    folder = "iter_{:07d}"
    tracker = "latest_checkpointed_iteration.txt"
    by_link = True

    def shards(self, rank: int, world: int) -> list[str]:
        return ([] if rank else ["common.pt"]) + super().shards(rank, world)

    def last(self) -> list[str]:
        return [".metadata", "metadata.json"]

    def index(self, storage: dict[Any, Any]) -> Metadata:
        made = Metadata(storage)
        made.all_local_plans = []  # type: ignore[attr-defined]
        return made

    def content(self, name: str, values: Values, world: int) -> bytes:
        if name == "metadata.json":
            return json.dumps({"sharded_backend": "torch_dist"}).encode()
        return super().content(name, values, world)


class HfTrainer(Saves):
    """transformers' Trainer: each rank its random state, rank 0 everything else, and
    `trainer_state.json` last of it, without waiting for the others."""

    name = "hf-trainer"
    folder = "checkpoint-{}"

    def shards(self, rank: int, world: int) -> list[str]:
        own = ["model.safetensors", "optimizer.pt", "scheduler.pt"]
        end = [] if rank else ["trainer_state.json"]
        return ([] if rank else own) + [f"rng_state_{rank}.pth"] + end

    def content(self, name: str, values: Values, world: int) -> bytes:
        if name == "trainer_state.json":
            return json.dumps({"global_step": values["step"], **values}, indent=2).encode()
        if name == "model.safetensors":
            tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
            told = {key: json.dumps(value) for key, value in values.items()}
            header = json.dumps({"__metadata__": told, "weight": tensor}).encode()
            return len(header).to_bytes(8, "little") + header + b"\1" * 16
        return super().content(name, values, world)


class Verl(Saves):
    """verl with FSDP: three files a rank, `data.pt` when all are there, then the tracker."""

    name = "verl"
    folder = "global_step_{}"
    tracker = "latest_checkpointed_iteration.txt"

    def shards(self, rank: int, world: int) -> list[str]:
        kinds = ("model", "optim", "extra_state")
        return [f"actor/{kind}_world_size_{world}_rank_{rank}.pt" for kind in kinds]

    def last(self) -> list[str]:
        return ["data.pt"]


class Own(Saves):
    """A program of one's own, described in run.yaml."""

    name = "own"
    folder = "ckpt_{}"
    tracker = "newest.txt"
    layout = {  # noqa: RUF012
        "pattern": "ckpt_{iteration}",
        "marker": "DONE",
        "files": ["rank0.pt", "rank1.pt"],
        "tracker": "newest.txt",
        "tracker_holds": "iteration",
    }

    def shards(self, rank: int, world: int) -> list[str]:
        return [f"rank{rank}.pt"]

    def last(self) -> list[str]:
        return ["DONE"]

    def content(self, name: str, values: Values, world: int) -> bytes:
        return b"done\n" if name == "DONE" else super().content(name, values, world)


ALL: dict[str, Saves] = {
    made.name: made for made in (DeepSpeed(), Megatron(), Dcp(), HfTrainer(), Verl(), Own())
}


def named(name: str, tensor_parallel: int) -> Saves:
    return DeepSpeed(tensor_parallel) if name == "deepspeed" else ALL[name]


def written(path: str, content: bytes, end: str) -> Iterator[str]:
    """A file in three writes, of which the last is called `end`; an index and a marker have their
    names only when they are whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    name = os.path.basename(path)
    there = path + ".tmp" if name in (".metadata", "DONE") else path
    with open(there, "wb", buffering=0) as stream:
        yield "open " + name
        stream.write(content[: len(content) // 2])
        yield "half " + name
        stream.write(content[len(content) // 2 :])
    os.replace(there, path)
    yield end


def files_of(path: str) -> list[str]:
    """The files of a checkpoint, relative, in alphabetical order."""
    found = []
    for top, _, names in os.walk(path):
        found += [os.path.relpath(os.path.join(top, name), path) for name in names]
    return sorted(found)


def values_of(path: str) -> list[Values]:
    """What each file of a checkpoint says of itself; raises when one cannot be read."""
    found = []
    for name in files_of(path):
        full = os.path.join(path, name)
        if name.endswith((".pt", ".pth", ".distcp")):
            found.append(checkpoints.load_file(full))
        elif name.endswith(".safetensors"):
            with open(full, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            told = header["__metadata__"]
            found.append({key: json.loads(value) for key, value in told.items()})
        elif name == "trainer_state.json":
            with open(full) as stream:
                found.append(json.load(stream))
    return found
