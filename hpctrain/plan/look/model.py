"""A model's folder against what the trainer takes: family, positions, weights, tokenizer, dtype."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.plan.look.reading import Reader
from hpctrain.recipes.facts import Model
from hpctrain.recipes.trainer_config import positions_of
from hpctrain.runtime import hubcache
from hpctrain.runtime.shards import damage

_MAX_HEADER = 1 << 20
_QUANTISED = {
    "I8",
    "U8",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
}  # safetensors' names; weights are none of these


def problems(model: Model, reader: Reader) -> Iterator[Problem]:
    """Everything that the folder contradicts; one that is not here is told elsewhere."""
    reader.turn_to(model.path)
    if not os.path.exists(model.path):
        return
    alone = model.path.endswith(".json")
    folder = os.path.dirname(model.path) if alone else model.path
    config = reader.json(model.path if alone else os.path.join(folder, "config.json"))
    if config is None:
        yield _no_config(model, reader, alone)
        return
    yield from _family(model, config)
    yield from _positions(model, config)
    if not alone:
        yield from _files(model, folder, reader)


def _no_config(model: Model, reader: Reader, alone: bool) -> Problem:
    adapter = None if alone else reader.json(os.path.join(model.path, "adapter_config.json"))
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        what = f"the {model.what} `{model.path}` is an adapter of `{base}`, no model"
        return Problem(what, model.where, hint="merge it into its base first, and name the result")
    lacks = "is no JSON object" if alone else "has no config.json that can be read"
    what = f"the {model.what} `{model.path}` {lacks}"
    hint = "name a folder in Hugging Face form, with config.json, weights and tokenizer"
    return Problem(what, model.where, hint=hint)


def _family(model: Model, config: Mapping[str, Any]) -> Iterator[Problem]:
    family = config.get("model_type")
    if model.families is not None and family not in model.families:
        yield Problem(
            f"the {model.what} `{model.path}` is of the family `{family}`, which the trainer does"
            " not know",
            model.where,
            why=f"it knows {', '.join(model.families)}",
            hint=model.instead,
        )
    quantised = config.get("quantization_config")
    if quantised and model.full_precision:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else ""
        yield Problem(
            f"the {model.what} `{model.path}` is quantised ({method or 'quantization_config'})",
            model.where,
            why="its weights cannot be trained",
            hint="name the full-precision model it was made from",
        )


def _positions(model: Model, config: Mapping[str, Any]) -> Iterator[Problem]:
    known = positions_of(config)
    if model.length and known and model.length > known:
        yield Problem(
            f"sequences of {model.length:,} tokens are longer than the {known:,} positions that the"
            f" {model.what} knows",
            model.where_length or model.where,
            why=f"`max_position_embeddings` of {model.path}",
            hint=f"at most {known}",
        )


def _files(model: Model, folder: str, reader: Reader) -> Iterator[Problem]:
    reader.turn_to(folder)
    lacking = [
        name
        for name in hubcache.missing_files(folder, weights=model.weights)
        if model.tokenizer or not name.startswith(("tokenizer", "vocab", "spiece"))
    ]
    if lacking:
        rest = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        yield Problem(
            f"the {model.what} `{model.path}` is not whole: {', '.join(lacking[:3])}{rest} missing",
            model.where,
            hint="finish the download or the copy",
        )
    if not model.weights:
        return
    shards = [name for name in reader.names(folder) if name.endswith(".safetensors")]
    for name in shards[:200]:
        path = os.path.join(folder, name)
        fault = damage(path, reader.size(path) or 0)
        if fault:
            yield Problem(f"`{path}` {fault}", model.where, hint="copy or download it again")
            return
    if shards:
        yield from _dtypes(model, os.path.join(folder, shards[0]), reader)


def _dtypes(model: Model, path: str, reader: Reader) -> Iterator[Problem]:
    try:
        head = reader.read(path, 0, 8)
        (length,) = struct.unpack("<Q", head)
        tensors = json.loads(reader.read(path, 8, length)) if length <= _MAX_HEADER else {}
    except (OSError, ValueError, struct.error):
        return
    kinds = {str(tensor.get("dtype")) for tensor in tensors.values() if isinstance(tensor, dict)}
    if kinds & _QUANTISED:
        yield Problem(
            f"the {model.what} `{model.path}` has weights of the type"
            f" {', '.join(sorted(kinds & _QUANTISED))}: it is quantised",
            model.where,
            hint="name the full-precision model it was made from",
        )
