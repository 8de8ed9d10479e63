"""Shards to the final pair, proven complete and written so that a reader sees the old pair, none,
or the new one.

The `.idx` appears last and makes the dataset: a killed merge leaves at most a `.bin` that no reader
opens, and the next run finishes it.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain import __version__
from hpctrain.base import files
from hpctrain.base.errors import EnvironmentFault, HpctrainError, Problem, Refused, UsageError
from hpctrain.data.dataset.header import dtype_for, paths
from hpctrain.data.dataset.indexed_dataset import Dataset, chunks, open_dataset, verify, write_index
from hpctrain.data.plan import FORMAT, Plan
from hpctrain.data.sources import Segment, same_stat
from hpctrain.data.worker import finished, segment_sha256, shard_files
from hpctrain.runtime.files import sync_folder

_COPY_BYTES = 8 << 20


def merge_shards(plan: Plan, force: bool = False) -> dict[str, Any]:
    """Write `PREFIX_text_document.bin/.idx/.json` from all shards, and give the dataset's manifest.

    Doing it twice, or at once from two places, gives the same files. Raises HpctrainError when
    shards are missing or do not sum up, UsageError when more records were bad than allowed, Refused
    when another dataset is there and not `force`.
    """
    with files.lock(os.path.join(plan.work_dir, "lock")):
        remove_leftovers(plan)
        done = up_to_date(plan)
        if done:
            return done
        manifests = [finished(plan, shard) for shard in plan.shards]
        missing = [str(index) for index, manifest in enumerate(manifests) if manifest is None]
        if missing:
            raise HpctrainError(
                f"{len(missing)} of {len(manifests)} shards are not done:"
                f" {', '.join(missing[:20])}",
                where=plan.work_dir,
                hint="run the same command again: only these are done",
            )
        shards = [manifest for manifest in manifests if manifest is not None]
        prove(plan, shards)
        manifest = _dataset_manifest(plan, shards)
        named = [shard_files(plan, shard) for shard in plan.shards]
        _publish_rejects(plan, manifest, force)
        dtype = dtype_for(plan.vocab_size)
        sizes = (part for one in named for part in _sizes(one.sizes))
        publish(
            plan.dataset,
            dtype,
            [one.bin for one in named],
            sizes,
            manifest["documents"],
            manifest,
            force,
        )
    return manifest


def prove(plan: Plan, shards: Sequence[dict[str, Any]]) -> None:
    """Every unit of every input was read exactly once, and every record is a document, rejected, or
    counted as empty.

    Raises HpctrainError naming what does not sum up, UsageError when the rejected are more than
    allowed.
    """
    problems = [*_unread(plan, shards), *_miscounted(plan, shards)]
    if problems:
        raise HpctrainError(problems)
    rejected = sum(manifest["rejected"] for manifest in shards)
    if rejected > plan.options.max_errors:
        raise UsageError(
            f"{rejected} bad records are more than --max-errors {plan.options.max_errors}",
            where=plan.work_dir,
            hint="raise --max-errors, or repair the data",
        )


def _unread(plan: Plan, shards: Sequence[dict[str, Any]]) -> Iterator[Problem]:
    """Where the shards' segments do not join, or end before their input does."""
    expected = [0] * len(plan.inputs)
    for shard, manifest in zip(plan.shards, shards):
        for segment, found in zip(shard.segments, manifest["segments"]):
            before = expected[segment.input]
            if found["first"] != before:
                text = (
                    f"shard {shard.index} began at {found['first']}, but the one before ended at"
                    f" {before}"
                )
                yield Problem(text, where=plan.inputs[segment.input].path)
            expected[segment.input] = found["last"]
    for source, end in zip(plan.inputs, expected):
        if end != source.units:
            yield Problem(f"read up to {end} of {source.units}", where=source.path)


def _miscounted(plan: Plan, shards: Sequence[dict[str, Any]]) -> Iterator[Problem]:
    """Shards whose own numbers do not sum up."""
    for manifest in shards:
        where = f"shard {manifest['shard']}"
        empty = manifest["blank_lines"] + manifest["special"].get("empty documents, dropped", 0)
        if manifest["records"] != manifest["documents"] + manifest["rejected"] + empty:
            text = (
                f"{manifest['records']} records, but {manifest['documents']} documents,"
                f" {manifest['rejected']} rejected and {empty} empty"
            )
            yield Problem(text, where=where)
        if manifest["model_sha256"] != plan.model_sha256:
            yield Problem("made with another model", where=where)
        if manifest["sizes_bytes"] != 4 * manifest["documents"]:
            yield Problem("its sizes do not match its documents", where=where)


def up_to_date(plan: Plan) -> dict[str, Any] | None:
    """The dataset's manifest when the final pair is there and is what `plan` would make, else
    None."""
    manifest = files.read_json(plan.dataset + ".json")
    if (
        not manifest
        or manifest.get("content_key") != plan.content_key
        or not _complete(plan.dataset, manifest)
    ):
        return None
    recorded = [source["mtime_ns"] for source in manifest["inputs"]]
    touched = any(source.mtime_ns != mtime for source, mtime in zip(plan.inputs, recorded))
    return manifest if not touched or _same_content(plan, manifest) else None


def in_the_way(plan: Plan) -> str:
    """Why the final pair cannot be written without --force (another dataset is there), or
    nothing."""
    there = [path for path in paths(plan.dataset) if os.path.lexists(path)]
    if not there:
        return ""
    if there == [paths(plan.dataset)[0]] and os.path.isfile(
        os.path.join(plan.work_dir, f"{plan.key}.plan.json")
    ):
        # a .bin alone may be our own merge, killed before its last step: `publish` compares the
        # bytes
        return ""
    return f"`{os.path.basename(there[-1])}` is there already"


def publish(
    dataset: str,
    dtype: str,
    bins: Sequence[str],
    sizes: Iterator[NDArray[Any]],
    num_documents: int,
    manifest: dict[str, Any],
    force: bool = False,
) -> None:
    """Write DATASET.bin/.idx/.json whole. Raises Refused when a pair is there and not `force`,
    EnvironmentFault on a full disk."""
    bin_path, idx_path = paths(dataset)
    if not force and os.path.lexists(idx_path):
        raise _refused(idx_path)
    with files.temporaries(bin_path, idx_path, dataset + ".json") as (
        bin_temp,
        idx_temp,
        json_temp,
    ):
        for path in bins:
            append(path, bin_temp.file)
        tokens = write_index(idx_temp.file, dtype, sizes, num_documents)
        size = bin_temp.file.tell()
        if size != tokens * np.dtype(dtype).itemsize or tokens != manifest["tokens"]:
            raise EnvironmentFault(
                f"{size} bytes were written for {tokens} tokens of {dtype}", where=bin_path
            )
        json_temp.file.write(files.to_json_bytes({**manifest, "bin_bytes": size}))
        for temp in (bin_temp, idx_temp, json_temp):
            temp.sync()
        if force:
            # Without its index the old pair is no dataset: between here and the last step there is
            # none, never a mixed one.
            for path in (idx_path, bin_path):
                if os.path.lexists(path):
                    os.unlink(path)
                    sync_folder(os.path.dirname(path) or ".")
        if not bin_temp.commit_new() and not _same_bytes(bin_temp.temp_path, bin_path):
            raise _refused(bin_path)
        json_temp.commit()
        if not idx_temp.commit_new():
            raise _refused(idx_path)


def merge_datasets(prefixes: Sequence[str], output: str, force: bool = False) -> dict[str, Any]:
    """Concatenate datasets into one, in the order given. All must open, verify and share one dtype;
    problems come at once."""
    opened, problems = _open_all(prefixes)
    kinds = sorted({dataset.dtype for dataset in opened})
    if len(kinds) > 1:
        found = ", ".join(f"`{dataset.prefix}` is {dataset.dtype}" for dataset in opened)
        hint = "different dtypes come from different tokenizers"
        problems.append(Problem(f"the datasets have different dtypes: {found}", hint=hint))
    models = _models_of(opened)
    if len(models) > 1:
        found = ", ".join(f"`{name}`" for name in models.values())
        problems.append(Problem(f"made with different tokenizer models: {found}"))
    target = paths(output)[0][:-4]
    if any(os.path.realpath(dataset.prefix) == os.path.realpath(target) for dataset in opened):
        problems.append(Problem("the output is one of the inputs", where=output))
    if problems:
        raise UsageError(problems)
    documents = sum(len(dataset) for dataset in opened)
    tokens = sum(dataset.num_tokens for dataset in opened)
    manifest = {
        "format": FORMAT,
        "merged_from": [dataset.prefix for dataset in opened],
        "model_sha256": next(iter(models), None),
        "documents": documents,
        "tokens": tokens,
        "dtype": kinds[0],
        "version": __version__,
    }
    sizes = (part for dataset in opened for part in chunks(dataset.sizes))
    files.sweep(target + ".")
    publish(
        target,
        kinds[0],
        [paths(dataset.prefix)[0] for dataset in opened],
        sizes,
        documents,
        manifest,
        force,
    )
    return {"output": target, **manifest}


def _open_all(prefixes: Sequence[str]) -> tuple[list[Dataset], list[Problem]]:
    problems: list[Problem] = []
    opened = []
    for prefix in prefixes:
        try:
            dataset = open_dataset(prefix)
        except HpctrainError as error:
            problems += error.problems
            continue
        problems += [problem for problem in verify(dataset) if problem.level == "error"]
        opened.append(dataset)
    return opened, problems


def _models_of(datasets: Sequence[Dataset]) -> dict[str, str]:
    """{checksum of a tokenizer's model: the first dataset made with it}, where that is known."""
    models: dict[str, str] = {}
    for dataset in datasets:
        facts = files.read_json(dataset.prefix + ".json")
        if facts and facts.get("model_sha256"):
            models.setdefault(facts["model_sha256"], dataset.prefix)
    return models


def append(path: str, target: IO[bytes]) -> None:
    """Append the file at `path` to the open file `target`."""
    with open(path, "rb") as file:
        shutil.copyfileobj(file, target, _COPY_BYTES)


def remove_leftovers(plan: Plan) -> None:
    """Remove what merges of this dataset that were killed have left beside it."""
    files.sweep(plan.dataset + ".", plan.prefix + ".rejects.")


def clean_up(plan: Plan) -> None:
    """Remove the shards of a plan whose dataset is complete; their manifests stay, as the record of
    what was done."""
    for shard in plan.shards:
        one = shard_files(plan, shard)
        for path in (one.bin, one.sizes, one.rejects, one.reasons, one.failure):
            files.remove(path)
    for path in files.leftovers(plan.work_dir, plan.key):
        files.remove(path)


def _sizes(path: str) -> Iterator[NDArray[Any]]:
    with open(path, "rb") as file:
        while data := file.read(4 << 20):
            yield np.frombuffer(data, dtype="<i4")


def _dataset_manifest(plan: Plan, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    special: Counter[str] = Counter()
    for manifest in shards:
        special.update(manifest["special"])

    def total(name: str) -> int:
        return sum(manifest[name] for manifest in shards)

    return {
        "format": FORMAT,
        "content_key": plan.content_key,
        "key": plan.key,
        "dtype": dtype_for(plan.vocab_size),
        "documents": total("documents"),
        "tokens": total("tokens"),
        "records": total("records"),
        "rejected": total("rejected"),
        "blank_lines": total("blank_lines"),
        "unknown_tokens": total("unknown_tokens"),
        "special": dict(sorted(special.items())),
        "encoders": sorted({manifest["encoder"] for manifest in shards if manifest["encoder"]}),
        "encoder_notes": sorted(
            {note for manifest in shards for note in manifest["encoder_notes"]}
        ),
        "model_path": plan.model_path,
        "model_sha256": plan.model_sha256,
        "vocab_size": plan.vocab_size,
        "control": asdict(plan.control),
        "options": asdict(plan.options),
        "inputs": [asdict(source) for source in plan.inputs],
        "shards": [
            {
                name: manifest[name]
                for name in ("shard", "documents", "tokens", "bin_sha256", "segments")
            }
            for manifest in shards
        ],
        "cpu_s": round(total("cpu_s"), 3),
        "version": __version__,
    }


def _publish_rejects(plan: Plan, manifest: dict[str, Any], force: bool) -> None:
    names = (plan.prefix + ".rejects.jsonl", plan.prefix + ".rejects.reasons.jsonl")
    if not manifest["rejected"]:
        return
    with files.temporaries(*names) as temps:
        for temp, field in zip(temps, ("rejects", "reasons")):
            for shard in plan.shards:
                append(getattr(shard_files(plan, shard), field), temp.file)
            temp.sync()
            if force:
                temp.commit()
            elif not temp.commit_new() and not _same_bytes(temp.temp_path, temp.path):
                raise _refused(temp.path)
    manifest["rejects_file"] = names[0]


def _complete(dataset: str, manifest: dict[str, Any]) -> bool:
    bin_path, idx_path = paths(dataset)
    try:
        return os.stat(bin_path).st_size == manifest["bin_bytes"] and os.path.isfile(idx_path)
    except (OSError, KeyError):
        return False


def _same_content(plan: Plan, manifest: dict[str, Any]) -> bool:
    """Whether inputs that were written again since still have the bytes that were tokenized."""
    places = {
        source["path"]: index for index, source in reversed(list(enumerate(manifest["inputs"])))
    }
    for segment in (one for shard in manifest["shards"] for one in shard["segments"]):
        index = places.get(segment["path"])
        if index is None or not same_stat(plan.inputs[index]):
            return False
        now = segment_sha256(plan, Segment(index, segment["begin"], segment["end"]))
        if now != segment["sha256"]:
            return False
    return True


def _same_bytes(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _refused(path: str) -> Refused:
    return Refused(
        "is there already",
        where=path,
        hint="give another --output-prefix, or --force to replace it",
    )
