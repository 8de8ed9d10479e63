"""What the verbs print: outcomes, progress, and the summary that counts all that was special."""

from __future__ import annotations

import shlex
import time
from typing import Any

from hpctrain.base import terminal, units
from hpctrain.data.command import Outcome


class Watcher:
    """Progress of a tokenization on stderr: documents/s, MB/s and what is left."""

    def __init__(self) -> None:
        self._progress: terminal.Progress | None = None
        self._start = time.monotonic()
        self._first: tuple[int, int] | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.close()

    def __call__(self, shards: int, num_bytes: int, documents: int) -> None:
        if self._progress is None:
            self._progress = terminal.Progress("tokenize", unit="documents")
        if self._first is None:
            self._first, self._start = (num_bytes, documents), time.monotonic()
        elapsed = max(time.monotonic() - self._start, 1e-3)
        rate = (num_bytes - self._first[0]) / elapsed / 1e6
        speed = (documents - self._first[1]) / elapsed
        self._progress.update(
            documents, f"{speed:,.0f} documents/s, {rate:.1f} MB/s, {shards} shards done"
        )


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as the fields of a JSON answer."""
    plan = outcome.plan
    manifest = {
        key: value
        for key, value in (outcome.manifest or {}).items()
        if key not in ("shards", "inputs", "format")
    }
    return {
        "status": outcome.status,
        "engine": outcome.engine,
        "dataset": plan.dataset,
        "work_dir": plan.work_dir,
        "shards": len(plan.shards),
        "shards_done_before": outcome.done_before,
        "array_tasks": outcome.shape.num_tasks if outcome.shape else None,
        "array_parallel": outcome.shape.parallel if outcome.shape else None,
        "time_s": outcome.shape.time_s if outcome.shape else None,
        "job_ids": list(outcome.job_ids),
        "inputs": [{"path": source.path, "size": source.size} for source in plan.inputs],
        "control_tokens": {token.marker: token.id for token in plan.control.tokens},
        "eod_id": plan.control.eod_id,
        "notes": [note.as_json() for note in outcome.notes],
        "manifest": manifest or None,
    }


def outcome(result: Outcome) -> None:
    """An outcome for a person: the dataset's path to stdout, the summary to stderr, the next
    command last."""
    plan = result.plan
    if result.status == "planned":
        total = sum(source.size for source in plan.inputs)
        terminal.info(
            f"{len(plan.inputs)} inputs, {units.format_size(total)}, in {len(plan.shards)} shards,"
            f" {result.done_before} done"
        )
        terminal.info(
            "control tokens:"
            f" {', '.join(f'{token.marker} = {token.id}' for token in plan.control.tokens)}"
        )
        terminal.info(
            f"end of document: {plan.control.eod_piece or 'none'} = {plan.control.eod_id}"
        )
        terminal.info(f"would write {plan.dataset}.bin and .idx ({result.engine})")
        return
    if result.status == "queued":
        terminal.data(plan.dataset)
        terminal.info(f"progress: squeue --name=tok-{plan.key}")
        terminal.next_step("the same command, to wait or to see what is missing")
        return
    manifest = result.manifest or {}
    if result.status == "unchanged":
        terminal.info("the dataset is there already and nothing has changed")
    documents, tokens = manifest.get("documents", 0), manifest.get("tokens", 0)
    terminal.info(
        f"{documents:,} documents, {tokens:,} tokens ({tokens / max(1, documents):,.0f} a"
        f" document), {manifest.get('dtype')}"
    )
    terminal.info(f"encoder: {', '.join(manifest.get('encoders', ())) or 'none needed'}")
    notes = manifest.get("encoder_notes", ())
    for note in notes[:3]:
        terminal.info(f"  {note}")
    if len(notes) > 3:
        terminal.info(f"  … {len(notes) - 3} more in {plan.dataset}.json")
    special = dict(manifest.get("special", {}))
    for name in ("blank_lines", "unknown_tokens", "rejected"):
        if manifest.get(name):
            special[name.replace("_", " ")] = manifest[name]
    for name, count in special.items():
        terminal.info(f"  {count:,} {name}")
    if manifest.get("rejects_file"):
        terminal.info(
            f"rejected records: {manifest['rejects_file']} (why:"
            f" {manifest['rejects_file'][:-6]}.reasons.jsonl)"
        )
    terminal.data(plan.dataset)
    terminal.next_step(
        shlex.join(["hpctrain", "data", "inspect", plan.dataset, "--tokenizer", plan.model_path])
    )
