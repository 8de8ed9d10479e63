"""What a model directory says of itself, before anything is loaded: full precision or not, how many
parameters, how big.

Reads config files and the headers of safetensors files only, but for `load_base`.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.base.units import format_size
from hpctrain.config.trainers.trl import HfSftConfig, quantised_name, quantised_problem

if TYPE_CHECKING:
    import torch

# Of safetensors' own names; what a full-precision base is stored in.
FULL_PRECISION = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_QUANTISED_TENSORS = (
    "absmax",
    "quant_state",
    "qweight",
    "qzeros",
    "weight_scale",
    "SCB",
    "nested_absmax",
)


@dataclass(frozen=True)
class Weights:
    """The tensors of a directory: number of values, bytes by the headers, bytes of the files, and
    dtypes."""

    parameters: int
    num_bytes: int
    file_bytes: int
    dtypes: tuple[str, ...]
    names: frozenset[str]


def read_json(path: str) -> dict[str, Any]:
    """A JSON object of a file, {} where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read it: {error}", where=path) from error
    return found if isinstance(found, dict) else {}


def read_weights(folder: str) -> Weights | None:
    """What the safetensors files of a directory hold, None where there are none. Raises UsageError
    for damaged ones."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    files = [file for file in files if not os.path.basename(file).startswith("adapter_")]
    parameters = num_bytes = file_bytes = 0
    dtypes: set[str] = set()
    names: set[str] = set()
    for path in files:
        for name, tensor in _header(path).items():
            if name == "__metadata__":
                continue
            count = 1
            for size in tensor["shape"]:
                count *= size
            parameters += count
            num_bytes += tensor["data_offsets"][1] - tensor["data_offsets"][0]
            dtypes.add(tensor["dtype"])
            names.add(name)
        file_bytes += os.path.getsize(path)
    return (
        Weights(parameters, num_bytes, file_bytes, tuple(sorted(dtypes)), frozenset(names))
        if files
        else None
    )


def base_folder(config: HfSftConfig) -> str:
    """Where the weights lie that an update belongs to: `model_name`, unless the run started from a
    whole model."""
    if config.start and not os.path.isfile(os.path.join(config.start, "adapter_config.json")):
        return str(config.start)
    return str(config.model_name)


def check_base(folder: str, named: str = "") -> Weights | None:
    """The weights of a full-precision base. `named`: how the run calls it, where that is not the
    folder.

    Raises UsageError when the folder is no model, an adapter, or quantised: by its name, its
    config.json, or its tensors.
    """
    problems = []
    adapter = read_json(os.path.join(folder, "adapter_config.json"))
    model_config = read_json(os.path.join(folder, "config.json"))
    hint = "name the full-precision model it was made from"
    if adapter and not model_config:
        problems.append(
            Problem(
                f"it is an adapter of `{adapter.get('base_model_name_or_path')}`, no model",
                where=folder,
            )
        )
    elif not model_config:
        problems.append(
            Problem(
                "it has no config.json",
                where=folder,
                hint="name the Hugging Face directory of a model",
            )
        )
    why = quantised_problem(model_config)
    part = next(filter(None, map(quantised_name, (named, folder, _hub_name(folder)))), "")
    if why or part:
        problems.append(
            Problem(
                f"the base is quantised: {why or f'its name says `{part}`'}",
                where=folder,
                hint=hint,
            )
        )
    weights = None if problems else read_weights(folder)
    if weights:
        odd = [dtype for dtype in weights.dtypes if dtype not in FULL_PRECISION]
        traces = sorted(
            name for name in weights.names if name.rsplit(".", 1)[-1] in _QUANTISED_TENSORS
        )
        if odd or traces:
            what = f"it holds {', '.join(odd)} tensors" if odd else f"it holds `{traces[0]}`"
            problems.append(Problem(f"the base is quantised: {what}", where=folder, hint=hint))
    if problems:
        raise UsageError(problems)
    return weights


def check_adapter(folder: str, base: str, base_named: str = "") -> dict[str, Any]:
    """The adapter_config.json of an update of this base, {} when the folder holds whole weights.

    Raises UsageError when it was made for a quantised base, or for another one.
    """
    adapter = read_json(os.path.join(folder, "adapter_config.json"))
    if not adapter:
        return {}
    own = str(adapter.get("base_model_name_or_path") or "")
    part = quantised_name(own) or quantised_name(_hub_name(own))
    why = (
        quantised_problem(read_json(os.path.join(own, "config.json"))) if os.path.isabs(own) else ""
    )
    if part or why:
        raise UsageError(
            f"the update was trained on a quantised base: `{own}`",
            where=folder,
            why=why or f"its name says `{part}`",
            hint="train it again on the full-precision base; merging it would corrupt the weights",
        )
    if own and not _same_model(own, base, base_named):
        raise UsageError(
            f"the update was trained on `{own}`, and the base is `{base_named or base}`",
            where=folder,
            why="adapter_config.json says so",
            hint="merge it into the base it was trained on",
        )
    return adapter


def check_space(config: HfSftConfig, weights: Weights | None, folder: str) -> str:
    """What the checkpoint folder has free and what the run needs, in words. Raises EnvironmentFault
    when it is less.

    Without `disk_gib`, the need is two checkpoints: while a new one is written, an old one must
    stay.
    """
    free = shutil.disk_usage(folder).free
    if config.disk_gib is not None:
        need, why = config.disk_gib * 1024**3, "`disk_gib`"
    else:
        # Adam keeps two numbers beside each that is trained; a trained one is fp32 (transformers
        # saves both).
        hidden = weights.parameters if weights else 0
        trained = hidden if config.lora is None else _lora_parameters(config, hidden)
        need, why = 2 * 12 * trained, f"two checkpoints of {format_size(12 * trained)}"
    said = f"{format_size(free)} free for checkpoints, {format_size(need)} needed ({why})"
    if free < need:
        raise EnvironmentFault(
            f"too little space: {said}",
            where=folder,
            hint="free some, or name another `checkpoint.dir`",
        )
    return said


def _lora_parameters(config: HfSftConfig, parameters: int) -> int:
    """An upper estimate: a rank-r update of square matrices of width d has 2 r / d of their
    parameters, and d >= 1024."""
    return int(parameters * min(2 * config.lora["r"] / 1024, 1.0))


def _header(path: str) -> dict[str, Any]:
    """The header of a safetensors file (huggingface/safetensors, "Format")."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > 100_000_000:
                raise ValueError("no safetensors header")
            header: dict[str, Any] = json.loads(file.read(size))
        ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
        if os.path.getsize(path) != 8 + size + max(ends, default=0):
            raise ValueError("it is cut short")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UsageError(f"not a whole safetensors file: {error}", where=path) from error
    return header


def _hub_name(folder: str) -> str:
    """ORG/NAME of a snapshot in a hub cache (`models--ORG--NAME/snapshots/<commit>`), else
    empty."""
    parts = folder.rstrip("/").split("/")
    return next(
        (
            part[len("models--") :].replace("--", "/")
            for part in parts
            if part.startswith("models--")
        ),
        "",
    )


def _same_model(one: str, other: str, other_named: str) -> bool:
    """Whether two names mean one model: the same place, the same hub id, or the same last part of a
    name."""
    names = {(_hub_name(name) or name).rstrip("/") for name in (other, other_named) if name}
    name = (_hub_name(one) or one).rstrip("/")
    if os.path.realpath(one) == os.path.realpath(other) or name in names:
        return True
    return os.path.basename(name).lower() in {os.path.basename(known).lower() for known in names}


def load_base(folder: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The plain transformers model of a directory, from files only. Raises UsageError when it does
    not load."""
    from hpctrain.train.sft.model import read_pretrained  # torch, for which the rest has no use

    return read_pretrained(
        folder, dtype, **({"attn_implementation": attention} if attention else {})
    )
