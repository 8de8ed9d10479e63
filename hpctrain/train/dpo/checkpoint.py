"""Checkpoints of the DPO trainer in PyTorch's distributed format, whole or not at all, and going on
from one.

    DIR/step-20/    __R_0.distcp of each rank, .metadata, hpctrain.json, config.json
    DIR/latest      `step-20`, replaced by rename after that

Weights and optimizer are cut into new shards when the number of ranks changes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from hpctrain.base.errors import EnvironmentFault
from hpctrain.train.core import checkpoint as whole

STEP = re.compile(r"step-(\d+)\Z", re.ASCII)


@dataclass(frozen=True)
class Progress:
    """Where a run is, as its checkpoint tells the next link; written to hpctrain.json."""

    run_id: str
    iteration: int
    consumed_samples: int
    num_ranks: int
    train_batch_size: int
    precision: str
    seed: int
    data_fingerprint: str
    reference_key: str
    config: dict[str, Any]


def save(
    model: Any,
    optimizer: Any,
    directory: str,
    progress: Progress,
    model_config: dict[str, Any],
    barrier: Callable[[], None],
    rank: int,
) -> str:
    """Write `step-N` on all ranks together and name it in `latest`; returns its path. See
    `train.checkpoint.publish`."""

    def write(partial: str) -> None:
        weights, state = state_dicts.get_state_dict(model, optimizer)
        writer = dcp.FileSystemWriter(partial, sync_files=True)
        try:
            dcp.save({"model": weights, "optimizer": state}, storage_writer=writer)
        except CheckpointException as error:
            # raised on all ranks, with what each of them met; no Exception
            raise RuntimeError(str(_first_failure(error))) from _first_failure(error)

    files = {
        whole.META: json.dumps(asdict(progress), indent=1).encode(),
        "config.json": json.dumps(model_config, indent=1, default=str).encode(),
    }
    return whole.publish(directory, f"step-{progress.iteration}", write, files, barrier, rank)


def load(model: Any, optimizer: Any | None, path: str) -> None:
    """Put a checkpoint's weights, and with an `optimizer` its state, into place on all ranks.

    Raises UsageError when it is of another model, EnvironmentFault when it cannot be read.
    """
    try:
        _check_shapes(model, path)
        if optimizer is None:
            state: dict[str, Any] = {"model": state_dicts.get_model_state_dict(model)}
        else:
            weights, optimizer_state = state_dicts.get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": optimizer_state}
        with whole.plain_types(path):
            dcp.load(state, storage_reader=_Reader(path))
        state_dicts.set_model_state_dict(model, state["model"])
        if optimizer is not None:
            state_dicts.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
        CheckpointException,
    ) as error:
        cause = _first_failure(error)
        raise EnvironmentFault(
            f"cannot load the checkpoint: {whole.describe_failure(cause)}",
            where=path,
            hint="`hpctrain checkpoint verify` looks at its files",
        ) from cause


class _Reader(dcp.FileSystemReader):  # type: ignore[misc]
    """DCP's reader, which makes of `.metadata` what DCP writes there, and runs nothing of it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            metadata = _Metadata(file).load()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Metadata(pickle.Unpickler):
    _MODULES = re.compile(r"torch\.distributed\.checkpoint\.(metadata|planner|filesystem)")
    _OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}

    def find_class(self, module: str, name: str) -> Any:
        """A class of DCP's own, a type of numbers, or UnpicklingError."""
        own = self._MODULES.fullmatch(module) and "." not in name
        if own or (module == "torch" and "." not in name) or (module, name) in self._OTHERS:
            found = super().find_class(module, name)
            defined = own and isinstance(found, type) and found.__module__ == module
            if defined or isinstance(found, torch.dtype) or (module, name) in self._OTHERS:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")


def _check_shapes(model: Any, path: str) -> None:
    """Raises UsageError when a checkpoint is of another model: of a tensor of another shape DCP
    reads what overlaps, and leaves the rest as it was, without a word."""
    stored = _Reader(path).read_metadata().state_dict_metadata
    have = {
        name.removeprefix("model."): tuple(about.size)
        for name, about in stored.items()
        if name.startswith("model.") and hasattr(about, "size")
    }
    own = state_dicts.get_model_state_dict(model)
    whole.check_shapes(path, {name: tuple(value.shape) for name, value in own.items()}, have)


def _first_failure(error: BaseException) -> BaseException:
    """What a rank met, where DCP collected it from all of them."""
    return (
        next((found for found, _ in error.failures.values()), error)
        if isinstance(error, CheckpointException)
        else error
    )


def check_resume(path: str, now: Progress) -> Progress:
    """The progress of a checkpoint if this run can go on from it exactly; else Refused, with all
    that stands against it."""
    then = whole.progress_to_resume(path, Progress)
    same_data = then.data_fingerprint == now.data_fingerprint
    fresh = "or begin a new run in another checkpoint folder"
    batch = "the batch (batch_size x gradient_accumulation_steps x ranks)"
    whole.refuse_changes(
        path,
        [
            whole.Change(
                then.precision != now.precision,
                f"`precision` changed: it was {then.precision} and is {now.precision}",
                "the cached reference log-probabilities have that precision",
                f"go back to {then.precision}, {fresh}",
            ),
            whole.Change(
                then.seed != now.seed,
                f"`dpo_training.seed` changed: it was {then.seed} and is {now.seed}",
                "it orders the data",
                f"go back to {then.seed}, {fresh}",
            ),
            whole.Change(
                then.train_batch_size != now.train_batch_size,
                f"{batch} changed: it was {then.train_batch_size} and is {now.train_batch_size}",
                "it orders the data",
                f"choose them such that their product is {then.train_batch_size} again, {fresh}",
            ),
            whole.Change(
                not same_data,
                "the data changed",
                "the tokens differ: the files, the tokenizer, `subset` or `max_len` changed",
                f"put the old data back, {fresh}",
            ),
            whole.Change(
                # The key hashes the data and the precision too.
                same_data
                and then.precision == now.precision
                and then.reference_key != now.reference_key,
                "the reference model changed",
                "its weights differ, so every margin would jump",
                f"put the old reference back, {fresh}",
            ),
        ],
    )
    return then
