"""One shard: read its segments, encode, write to temporary names, fsync, rename, and only then
describe it in a manifest.

A shard is done if and only if its manifest is there and fits. Killing a worker at any instruction
leaves no manifest, or a right one.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain import __version__
from hpctrain.base import files
from hpctrain.base.errors import EnvironmentFault, HpctrainError, Problem, UsageError
from hpctrain.data.dataset.header import dtype_for
from hpctrain.data.encoders import memory
from hpctrain.data.encoders.encode import choose_encoder
from hpctrain.data.encoders.reference import (
    Encoder,
    EncoderDisagrees,
    SentencePieceEncoder,
    never_from_text,
    processor,
    unknown_id,
)
from hpctrain.data.markers import ALLOWABLE, SPAN, Fault, Splitter
from hpctrain.data.plan import FORMAT, Plan, Shard
from hpctrain.data.records import Extractor, json_reader, read_line
from hpctrain.data.sources import Block, Input, Segment, SegmentReader, line_number, same_stat
from hpctrain.data.spm import SpmModel, load_model

SHOWN_PROBLEMS = 20
_BOM = b"\xef\xbb\xbf"

Report = Callable[[int, int], None]  # (bytes of input read, documents) of this shard so far


@dataclass(frozen=True)
class ShardFiles:
    """Where one shard's output lies."""

    bin: str
    sizes: str
    rejects: str
    reasons: str
    manifest: str
    failure: str


def shard_files(plan: Plan, shard: Shard) -> ShardFiles:
    base = os.path.join(plan.work_dir, f"{plan.key}-{shard.index:05d}")
    return ShardFiles(
        *(base + end for end in (".bin", ".sizes", ".rejects", ".reasons", ".json", ".failed.json"))
    )


def finished(plan: Plan, shard: Shard) -> dict[str, Any] | None:
    """The manifest of a shard that is done, else None: it must fit the plan, the inputs as they
    are, and its own files."""
    paths = shard_files(plan, shard)
    manifest = files.read_json(paths.manifest)
    if manifest is None or manifest.get("format") != FORMAT or manifest.get("key") != plan.key:
        return None
    try:
        for path, size in (
            (paths.bin, "bin_bytes"),
            (paths.sizes, "sizes_bytes"),
            (paths.rejects, "rejects_bytes"),
        ):
            if os.stat(path).st_size != manifest[size]:
                return None
    except (OSError, KeyError):
        return None
    for segment, described in zip(shard.segments, manifest["segments"]):
        source = plan.inputs[segment.input]
        if described["mtime_ns"] != source.mtime_ns and described["sha256"] != segment_sha256(
            plan, segment
        ):
            return None
    return manifest


def run_shard(
    plan: Plan, shard: Shard, report: Report = lambda num_bytes, documents: None
) -> dict[str, Any]:
    """Do one shard, unless it is done, and give its manifest.

    Raises UsageError with the bad records (at most 20), EnvironmentFault for a changed input, a
    full disk or a broken file.
    """
    done = finished(plan, shard)
    if done is not None:
        return done
    model = load_model(plan.model_path)
    if model.sha256 != plan.model_sha256:
        raise EnvironmentFault(
            "the tokenizer model changed since the run was planned", where=plan.model_path
        )
    memory.keep()
    with _without_collector():
        try:
            return _Work(plan, shard, model, report).run()
        except EncoderDisagrees as error:
            # Whatever it wrote is gone with its temporary file; the reference does the whole shard,
            # and those to come.
            notes = (f"the fast encoder was dropped: {error}",)
            _encoders[model.sha256, plan.options.encoder] = SentencePieceEncoder(model, notes)
            return _Work(plan, shard, model, report).run()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of short-lived lists without a cycle among them: the collector would only look at
    them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_encoders: dict[tuple[str, str], Encoder] = {}  # kept between the shards of one process


@dataclass
class _Totals:
    records: int = 0
    documents: int = 0
    tokens: int = 0
    spans: int = 0
    unknown: int = 0
    rejected: int = 0
    blank: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


class _Work:
    def __init__(self, plan: Plan, shard: Shard, model: SpmModel, report: Report):
        self.plan, self.shard, self.model, self.report = plan, shard, model, report
        self.splitter = Splitter(plan.control.ids(), plan.options.allow)
        self.extractor = Extractor(plan.options.form, plan.control, self.splitter)
        self.total = _Totals()
        self.loads, self.lenient = json_reader()
        self.extractor.suspicious = self.lenient
        self.encoder: Encoder | None = None
        self.writes = self.unreadable = False
        self.forged = _ForgeryCheck(model, plan.control.forgeable)
        self.forbidden = never_from_text(model, plan.control.forgeable)
        self.unknown_id = unknown_id(model)

    def run(self) -> dict[str, Any]:
        started, cpu = time.time(), time.process_time()
        paths = shard_files(self.plan, self.shard)
        with files.temporaries(paths.bin, paths.sizes, paths.rejects, paths.reasons) as temps:
            self.out, self.sizes, self.rejects, self.reasons = (temp.file for temp in temps)
            self.bin_hash = hashlib.sha256()
            self.writes = True
            segments = [self._segment(segment) for segment in self.shard.segments]
            if self.total.problems and (self.plan.options.on_error == "fail" or self.unreadable):
                raise UsageError(self.total.problems)
            if (
                self.total.rejected > self.plan.options.max_errors
                and self.plan.options.on_error == "skip"
            ):
                raise _too_many(
                    self.total.rejected, self.plan.options.max_errors, self.total.problems
                )
            rejects_bytes, sizes_bytes = self.rejects.tell(), self.sizes.tell()
            for temp in temps:
                temp.sync()
            for temp in temps:
                temp.commit()
        manifest = {
            "format": FORMAT,
            "key": self.plan.key,
            "shard": self.shard.index,
            "segments": segments,
            "model_sha256": self.plan.model_sha256,
            "records": self.total.records,
            "documents": self.total.documents,
            "tokens": self.total.tokens,
            "spans": self.total.spans,
            "unknown_tokens": self.total.unknown,
            "rejected": self.total.rejected,
            "blank_lines": self.total.blank,
            "special": dict(self.splitter.special),
            "bin_bytes": self.total.tokens * _itemsize(self.plan),
            "bin_sha256": self.bin_hash.hexdigest(),
            "sizes_bytes": sizes_bytes,
            "rejects_bytes": rejects_bytes,
            "encoder": self.encoder.name if self.encoder else "",
            "encoder_notes": list(self.encoder.notes) if self.encoder else [],
            "encoder_fallbacks": self.encoder.fallbacks if self.encoder else 0,
            "input_bytes": self.total.num_bytes,
            "wall_s": round(time.time() - started, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
            "version": __version__,
        }
        files.write_json(paths.manifest, manifest)
        return manifest

    def _segment(self, segment: Segment) -> dict[str, Any]:
        source = self.plan.inputs[segment.input]
        digest = hashlib.sha256()
        if not same_stat(source):
            raise _changed(source)
        reader = _reader(self.plan, segment, digest)
        lines = since_first = 0
        for block in self._blocks(reader):
            layout, spans, counts = self.read(block, source, lines)
            lines += len(block.records)
            self.total.num_bytes += block.num_bytes
            if self.total.problems and (self.plan.options.on_error == "fail" or self.unreadable):
                # Nothing will be written any more: look for more problems only, but not for long.
                since_first += block.num_bytes
                if len(self.total.problems) >= SHOWN_PROBLEMS or since_first > 256 << 20:
                    raise UsageError(self.total.problems)
                continue
            if spans or counts:
                if self.encoder is None:
                    self.encoder = self._encoder(spans)
                self._write(layout, spans, counts)
            self.report(self.total.num_bytes, self.total.documents)
        if not same_stat(source):
            raise _changed(source)
        return {
            "path": source.path,
            "size": source.size,
            "mtime_ns": source.mtime_ns,
            "fingerprint": source.fingerprint,
            "begin": segment.begin,
            "end": segment.end,
            "first": reader.first,
            "last": reader.last,
            "sha256": digest.hexdigest(),
        }

    def _blocks(self, reader: SegmentReader) -> Iterator[Block]:
        """The segment's blocks; one that cannot be read to its end is a problem among the others,
        and none of it is kept."""
        try:
            yield from reader.blocks()
        except UsageError as error:
            self.total.problems += error.problems
            self.unreadable = True

    def read(
        self, block: Block, source: Input, lines: int
    ) -> tuple[list[int], list[str], list[int]]:
        """Control ids and `SPAN`s of a block's documents, its spans, and how many entries of the
        first each document has."""
        layout: list[int] = []
        spans: list[str] = []
        counts: list[int] = []
        loads, add, eod = self.loads, self.extractor.add, self.plan.control.eod_id
        is_lines, lenient, forgeable = (
            source.kind != "parquet",
            self.lenient,
            bool(self.plan.control.forgeable),
        )
        if is_lines and block.offset == 0 and block.records and block.records[0][:3] == _BOM:
            block = self._without_bom(block)
        begin = 0
        for number, raw in enumerate(block.records):
            fault: Fault | None
            record: Any = raw
            num_spans = len(spans)
            if is_lines:
                try:
                    record, fault = loads(raw), None
                except (ValueError, RecursionError):
                    if not raw.strip():
                        self.total.blank += 1
                        continue
                    record, fault = read_line(raw)
                    self.extractor.suspicious = True
            else:
                fault = None
            fault = fault or add(record, layout, spans)
            if forgeable and not fault:
                fault = self.forged.fault(spans, num_spans)
            self.extractor.suspicious = lenient
            if fault:
                del layout[begin:], spans[num_spans:]
                self._fault(fault, block, number, source, lines)
            elif len(layout) > begin:
                if eod is not None:
                    layout.append(eod)
                counts.append(len(layout) - begin)
                begin = len(layout)
        self.total.records += len(block.records)
        return layout, spans, counts

    def _without_bom(self, block: Block) -> Block:
        if "bom" in self.plan.options.allow:
            self.splitter.special["byte order marks removed"] += 1
            return Block([block.records[0][3:], *block.records[1:]], 0, block.num_bytes)
        return block

    def _fault(self, fault: Fault, block: Block, number: int, source: Input, lines: int) -> None:
        self.total.rejected += 1
        problem = None
        if len(self.total.problems) < SHOWN_PROBLEMS or self.plan.options.on_error == "skip":
            problem = _problem(fault, block, number, source, lines)
        if problem and len(self.total.problems) < SHOWN_PROBLEMS:
            self.total.problems.append(problem)
        if self.plan.options.on_error == "skip" and problem and self.writes:
            raw = block.records[number]
            self.rejects.write((raw if isinstance(raw, bytes) else _as_json(raw)) + b"\n")
            self.reasons.write(
                _as_json({"where": problem.where, "kind": fault.kind, "what": problem.what}) + b"\n"
            )
            if self.total.rejected > self.plan.options.max_errors:
                raise _too_many(
                    self.total.rejected, self.plan.options.max_errors, self.total.problems
                )

    def _encoder(self, samples: Sequence[str]) -> Encoder:
        key = (self.model.sha256, self.plan.options.encoder)
        if key not in _encoders:
            _encoders.clear()
            _encoders[key] = choose_encoder(self.model, self.plan.options.encoder, samples)
        return _encoders[key]

    def _write(self, layout: list[int], spans: list[str], counts: list[int]) -> None:
        assert self.encoder is not None
        ids, lengths = self.encoder.encode(spans)
        if self.forbidden[ids].any():
            if isinstance(self.encoder, SentencePieceEncoder):
                raise AssertionError("text became a control token")
            raise EncoderDisagrees("text became a control token")
        self.total.unknown += int(np.count_nonzero(ids == self.unknown_id))
        tokens, sizes = assemble(layout, counts, ids, lengths, dtype_for(self.plan.vocab_size))
        data = tokens.tobytes()
        self.bin_hash.update(data)
        self.out.write(data)
        self.sizes.write(sizes.tobytes())
        self.total.documents += len(counts)
        self.total.tokens += len(tokens)
        self.total.spans += len(spans)


def assemble(
    layout: Sequence[int],
    counts: Sequence[int],
    ids: NDArray[Any],
    lengths: NDArray[Any],
    dtype: str,
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Tokens of all documents, and tokens per document (int32), from control ids and `SPAN`s and
    the encoded spans.

    `counts[d]` entries of `layout` belong to document d; `lengths[s]` of `ids` to span s. Raises
    UsageError for a document of more than 2**31 - 1 tokens, the limit of the index.
    """
    entries = np.array(layout, dtype=np.int64)
    is_control = entries != SPAN
    widths = np.ones(len(entries), dtype=np.int64)
    widths[~is_control] = lengths
    ends = np.cumsum(widths)
    total = int(ends[-1]) if len(ends) else 0
    tokens = np.empty(total, dtype=np.dtype(dtype).newbyteorder("<"))
    at = ends[is_control] - 1
    is_text = np.ones(total, dtype=bool)
    is_text[at] = False
    tokens[is_text] = ids
    tokens[at] = entries[is_control]
    document_ends = ends[np.cumsum(np.array(counts, dtype=np.int64)) - 1]
    sizes = np.diff(document_ends, prepend=0)
    if len(sizes) and int(sizes.max()) > 0x7FFFFFFF:
        raise UsageError("a document has more than 2147483647 tokens, the most an index can hold")
    return tokens, sizes.astype("<i4")


class _ForgeryCheck:
    """Finds spans that spell a user-defined control piece, after the model's own normalization."""

    def __init__(self, model: SpmModel, forgeable: Sequence[int]):
        self._pieces = [model.pieces[index] for index in forgeable]
        self._sp = processor(model) if forgeable else None

    def fault(self, spans: Sequence[str], begin: int) -> Fault | None:
        if self._sp is None:
            return None
        for span in spans[begin:]:
            text = self._sp.normalize(span)
            for piece in self._pieces:
                if piece in text or piece in span:
                    return Fault(
                        "forged", f"the text spells `{piece}`, which would become a control token"
                    )
        return None


def _problem(fault: Fault, block: Block, number: int, source: Input, lines: int) -> Problem:
    if source.kind == "parquet":
        return Problem(
            f"{fault.what} (character {fault.offset})",
            where=f"{source.path}: row {block.offset + number}",
        )
    offset = block.offset + sum(len(raw) + 1 for raw in block.records[:number])
    line = lines + number + 1
    if source.kind == "lines":
        # A range does not know how many lines came before it; only an error needs to, so count them
        # now.
        line = line_number(source, offset)
    if fault.kind in ("json", "utf-8", "bom", "text", "role") or (
        fault.kind == "nul" and "raw" in fault.what
    ):
        where = f"byte {offset + fault.offset}"
    else:
        where = f"character {fault.offset} of the text, in the line at byte {offset}"
    allowable = fault.kind in ALLOWABLE and "raw" not in fault.what
    hint = f"--allow {fault.kind} accepts it" if allowable else fault.hint
    return Problem(f"{fault.what} ({where})", where=f"{source.path}:{line}", hint=hint)


def _too_many(rejected: int, limit: int, problems: Sequence[Problem]) -> UsageError:
    text = f"{rejected} bad records are more than --max-errors {limit}"
    return UsageError([*problems, Problem(text, hint="raise --max-errors, or repair the data")])


def _changed(source: Input) -> HpctrainError:
    return EnvironmentFault(
        "the input changed since the run was planned",
        where=source.path,
        hint="run the same command again",
    )


def segment_sha256(plan: Plan, segment: Segment) -> str:
    """The hash of a segment's lines as they are now."""
    digest = hashlib.sha256()
    for _ in _reader(plan, segment, digest).blocks():
        pass
    return digest.hexdigest()


def _reader(plan: Plan, segment: Segment, digest: Any) -> SegmentReader:
    form = plan.options.form
    columns = [name for name in (form.text_key, form.messages_key, form.response_key) if name]
    return SegmentReader(
        plan.inputs[segment.input], segment, digest, plan.options.max_line_mib, columns
    )


def _itemsize(plan: Plan) -> int:
    return 2 if dtype_for(plan.vocab_size) == "uint16" else 4


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")


def check_segment(plan: Plan, segment: Segment, limit_bytes: int | None) -> list[Problem]:
    """The bad records of a segment (at most 20, of at most the first `limit_bytes`), found without
    encoding."""
    work = _Work(
        plan, Shard(0, (segment,)), load_model(plan.model_path), lambda num_bytes, documents: None
    )
    source = plan.inputs[segment.input]
    lines = seen = 0
    for block in work._blocks(_reader(plan, segment, hashlib.sha256())):
        work.read(block, source, lines)
        lines += len(block.records)
        seen += block.num_bytes
        if len(work.total.problems) >= SHOWN_PROBLEMS or (
            limit_bytes is not None and seen >= limit_bytes
        ):
            break
    return work.total.problems
