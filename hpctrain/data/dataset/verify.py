"""Is this dataset whole, and what its manifest says it is?"""

from __future__ import annotations

import hashlib

from hpctrain.base import files
from hpctrain.base.errors import Problem
from hpctrain.data.dataset import indexed_dataset
from hpctrain.data.dataset.header import paths
from hpctrain.data.dataset.indexed_dataset import Dataset, open_dataset
from hpctrain.data.spm import SpmModel


def verify_dataset(
    prefix: str, model: SpmModel | None = None, eod_piece: str = ""
) -> tuple[Dataset, list[Problem]]:
    """Open `prefix` and find everything wrong with it: structure, ids, EOD, and the hashes in its
    manifest if it has one.

    Raises EnvironmentFault or UsageError when it cannot be opened as a dataset at all.
    """
    dataset = open_dataset(prefix)
    manifest = files.read_json(dataset.prefix + ".json") or {}
    eod = (manifest.get("control") or {}).get("eod_id")
    if eod_piece and model:
        eod = model.pieces.index(eod_piece) if eod_piece in model.pieces else None
    vocab_size = model.vocab_size if model else manifest.get("vocab_size")
    problems = indexed_dataset.verify(dataset, vocab_size, eod)
    if model and manifest.get("model_sha256") not in (None, model.sha256):
        problems.append(
            Problem(
                "made with another tokenizer model",
                where=dataset.prefix,
                hint=manifest.get("model_path", ""),
            )
        )
    if manifest.get("shards"):
        problems += _check_hashes(dataset, manifest)
    elif not manifest:
        problems.append(
            Problem(
                "no manifest: its content cannot be compared with anything",
                where=dataset.prefix,
                level="note",
            )
        )
    return dataset, problems


def _check_hashes(dataset: Dataset, manifest: dict[str, object]) -> list[Problem]:
    bin_path = paths(dataset.prefix)[0]
    problems = []
    if manifest.get("documents") != len(dataset) or manifest.get("tokens") != dataset.num_tokens:
        text = (
            f"the manifest says {manifest.get('documents')} documents and {manifest.get('tokens')}"
            " tokens"
        )
        problems.append(
            Problem(
                f"{text}, but there are {len(dataset)} and {dataset.num_tokens}", where=bin_path
            )
        )
        return problems
    itemsize = dataset.tokens.dtype.itemsize
    with open(bin_path, "rb") as file:
        for shard in manifest["shards"]:  # type: ignore[attr-defined]
            digest, left = hashlib.sha256(), shard["tokens"] * itemsize
            while left:
                data = file.read(min(left, 8 << 20))
                if not data:
                    break
                digest.update(data)
                left -= len(data)
            if digest.hexdigest() != shard["bin_sha256"]:
                problems.append(
                    Problem(
                        f"the bytes of shard {shard['shard']} are not those that were written",
                        where=bin_path,
                    )
                )
    return problems
