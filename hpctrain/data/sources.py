"""Input files as streams of raw records: byte ranges of JSONL, whole .gz and .zst files, row groups
of parquet.

A range owns the lines that start in it. Readers hold one block in memory, whatever the file's size.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError, need

BLOCK_BYTES = 2 << 20
MAX_LINE_MIB = 64
SUFFIXES = {
    ".jsonl": "lines",
    ".json": "lines",
    ".ndjson": "lines",
    ".gz": "gz",
    ".zst": "zst",
    ".parquet": "parquet",
}
_FINGERPRINT_BYTES = 1 << 16
_NO_FILE = (
    "not a regular file: an input is read in parts, by several tasks, and again when it is checked"
)
_KNOWN = f"known: {' '.join(SUFFIXES)}"
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PAR1": "parquet"}


@dataclass(frozen=True)
class Input:
    """One input file as it was when planned. `units` is what ranges count: bytes, or row groups of
    parquet.

    `fingerprint` is the sha256 of the first and last 64 KiB and of the size.
    """

    path: str
    kind: str
    size: int
    mtime_ns: int
    units: int
    fingerprint: str

    @property
    def weight(self) -> int:
        """Roughly how many bytes of text are in it (compressed text is about a quarter of its
        size)."""
        return max(1, self.size if self.kind == "lines" else 4 * self.size)


@dataclass(frozen=True)
class Segment:
    """The units [begin, end) of input number `input`."""

    input: int
    begin: int
    end: int


@dataclass
class Block:
    """Consecutive raw records: lines as bytes (without the newline), or parquet rows as dicts.

    `offset` is the byte offset of the first line (in the uncompressed text), or the number of the
    first row.
    """

    records: Sequence[Any]
    offset: int
    num_bytes: int


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...
    def readline(self, limit: int, /) -> bytes: ...


def expand(paths: Sequence[str]) -> list[str]:
    """Files from files and folders (a folder: its known files, sorted). Raises UsageError with
    every problem at once."""
    files: list[str] = []
    problems: list[Problem] = []
    for path in paths:
        if os.path.isdir(path):
            inside, faults = _in_folder(path)
            files += inside
        else:
            faults = _input_faults(path)
            files += [] if faults else [path]
        problems += faults
    problems += _twice(files)
    if not paths:
        problems.append(Problem("no input given"))
    if problems:
        raise UsageError(problems)
    return files


def _in_folder(path: str) -> tuple[list[str], list[Problem]]:
    names = [name for name in sorted(os.listdir(path)) if os.path.splitext(name)[1] in SUFFIXES]
    files = [os.path.join(path, name) for name in names]
    if not files:
        return [], [Problem("no input files in this folder", where=path, hint=_KNOWN)]
    return files, [Problem(_NO_FILE, where=file) for file in files if _is_no_file(file)]


def _input_faults(path: str) -> list[Problem]:
    """Why the path of an input, which is no folder, cannot be read as one."""
    if _is_no_file(path):
        return [Problem(_NO_FILE, where=path, hint="write it to a file first")]
    if not os.path.isfile(path):
        longer = path + ".jsonl"
        hint = f"did you mean {glob.escape(longer)}?" if os.path.isfile(longer) else ""
        return [Problem("there is no such file", where=path, hint=hint)]
    if os.path.splitext(path)[1] not in SUFFIXES:
        what = "the name does not tell what kind of file this is"
        return [Problem(what, where=path, hint=_KNOWN)]
    return []


def _is_no_file(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


def _twice(files: Sequence[str]) -> list[Problem]:
    seen: dict[str, str] = {}
    problems = []
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            what = f"the same file twice: also given as `{seen[real]}`"
            problems.append(Problem(what, where=file))
        seen[real] = file
    return problems


def describe(path: str) -> Input:
    """The Input at `path`, as it is now. Raises EnvironmentFault when it cannot be read, UsageError
    when its name lies."""
    kind = SUFFIXES[os.path.splitext(path)[1]]
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            digest.update(str(stat.st_size).encode())
            head = file.read(_FINGERPRINT_BYTES)
            digest.update(head)
            file.seek(max(0, stat.st_size - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise EnvironmentFault(f"the input cannot be read: {error.strerror}", where=path) from None
    really = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), kind)
    if really != kind:
        raise UsageError(
            f"this is a {really} file, but its name ends in `{os.path.splitext(path)[1]}`",
            where=path,
            hint=f"rename it so that it ends in .{really}",
        )
    units = _parquet(path).num_row_groups if kind == "parquet" else stat.st_size
    return Input(
        os.path.abspath(path), kind, stat.st_size, stat.st_mtime_ns, units, digest.hexdigest()
    )


def same_stat(source: Input) -> bool:
    """Whether the file still has the size and time it had when planned."""
    try:
        stat = os.stat(source.path)
    except OSError:
        return False
    return stat.st_size == source.size and stat.st_mtime_ns == source.mtime_ns


class SegmentReader:
    """Blocks of one segment. After the last one, `first` and `last` are the units where it really
    began and ended.

    The ends of consecutive segments meet exactly (`last` of one is `first` of the next): the merge
    checks it. Of parquet only `columns` are read (None: all), as others may be large, or of kinds
    that Python has not. Raises UsageError for a broken compressed file or a line of more than
    `max_line_mib`, EnvironmentFault where the disk fails.
    """

    def __init__(
        self,
        source: Input,
        segment: Segment,
        digest: _Hash,
        max_line_mib: int = MAX_LINE_MIB,
        columns: Sequence[str] | None = None,
    ):
        self._source, self._segment, self._digest, self._columns = source, segment, digest, columns
        self._max_line = max_line_mib << 20
        self.first, self.last = segment.begin, segment.end
        self._done = 0

    def blocks(self) -> Iterator[Block]:
        try:
            if self._source.kind == "lines":
                with open(self._source.path, "rb") as file:
                    yield from self._lines(file, self._segment.begin, self._segment.end)
            elif self._source.kind == "parquet":
                yield from self._rows()
            else:
                yield from self._whole_file()
        except OSError as error:
            text = f"the input cannot be read: {error.strerror or error}"
            raise EnvironmentFault(text, where=self._source.path) from None

    def _lines(self, file: _Readable, begin: int, end: int | None) -> Iterator[Block]:
        if begin > 0:
            # A line belongs to the range in which it starts, so look at the byte before: it may end
            # the previous line.
            file.seek(begin - 1)
            begin += self._skip_line(file, begin) - 1
        self.first, offset, rest = begin, begin, b""
        while end is None or offset < end:
            size = (
                BLOCK_BYTES
                if end is None
                else min(BLOCK_BYTES, max(end - offset - len(rest), 1 << 16))
            )
            # Of a long line ever more at once, as `rest + data` copies it each time; never more
            # than may be in a line.
            data = file.read(min(max(size, len(rest)), self._max_line + 1 - len(rest)))
            if not data:
                if rest:
                    self._digest.update(rest)
                    yield Block([rest], offset, len(rest))
                    offset += len(rest)
                break
            data = rest + data if rest else data
            cut = data.rfind(b"\n") + 1
            if end is not None and offset + cut > end:
                # Lines that start at or after `end` belong to the next range.
                cut = data.find(b"\n", end - offset - 1) + 1
            if not cut:
                if len(data) > self._max_line:
                    raise self._too_long(offset)
                rest = data
                continue
            rest = data[cut:]
            data = data[:cut]
            self._digest.update(data)
            lines = data.split(b"\n")
            lines.pop()
            yield Block(lines, offset, cut)
            offset += cut
            self._done = offset
        self.last = offset if end is not None else self._segment.end

    def _skip_line(self, file: _Readable, begin: int) -> int:
        length = len(file.readline(self._max_line))
        if length >= self._max_line:
            raise self._too_long(begin)
        return length

    def _too_long(self, offset: int) -> UsageError:
        return UsageError(
            f"a line of more than {self._max_line >> 20} MiB",
            where=f"{self._source.path}: byte {offset}",
            why=(
                "a task needs up to 30 times its longest line in memory; the limit is"
                " --max-line-mib"
            ),
            hint="is this JSONL, one record a line? then raise --max-line-mib",
        )

    def _whole_file(self) -> Iterator[Block]:
        broken: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
        try:
            if self._source.kind == "gz":
                with gzip.open(self._source.path, "rb") as file:
                    yield from self._lines(file, 0, None)
            else:
                zstandard = need("zstandard", "fast")
                broken = (*broken, zstandard.ZstdError)
                with open(self._source.path, "rb") as raw:
                    yield from self._lines(_ZstdFile(raw, zstandard), 0, None)
        except broken as error:
            raise UsageError(
                f"broken {self._source.kind} file: {error}",
                where=f"{self._source.path}: byte {self._done} of its text",
                hint="make or copy the file again",
            ) from None
        self.first, self.last = self._segment.begin, self._segment.end

    def _rows(self) -> Iterator[Block]:
        file = _parquet(self._source.path)
        metadata = file.metadata
        columns = (
            None
            if self._columns is None
            else [name for name in self._columns if name in file.schema_arrow.names]
        )
        row = sum(metadata.row_group(index).num_rows for index in range(self._segment.begin))
        for group in range(self._segment.begin, self._segment.end):
            num_bytes = metadata.row_group(group).total_byte_size
            self._digest.update(
                f"{group}:{metadata.row_group(group).num_rows}:{num_bytes}\n".encode()
            )
            per_row = num_bytes // max(1, metadata.row_group(group).num_rows)
            size = max(1, min(1024, BLOCK_BYTES // max(1, per_row)))
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns):
                records = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
                yield Block(records, row, per_row * len(records))
                row += len(records)


def line_number(source: Input, offset: int) -> int:
    """The number (from 1) of the line that starts at `offset` of an uncompressed file; reads the
    file up to there."""
    count, left = 1, offset
    with open(source.path, "rb") as file:
        while left > 0:
            data = file.read(min(BLOCK_BYTES, left))
            if not data:
                break
            count += data.count(b"\n")
            left -= len(data)
    return count


class _ZstdFile:
    """Reads .zst, several frames too; unlike zstandard's stream_reader it notices a truncated
    file."""

    def __init__(self, raw: IO[bytes], zstandard: Any):
        self._raw = raw
        self._new: Callable[[], Any] = lambda: zstandard.ZstdDecompressor(
            max_window_size=1 << 31
        ).decompressobj()
        self._frame = self._new()
        self._started = False
        self._rest = b""
        self._bite = 64

    def read(self, size: int) -> bytes:
        parts, have = [], 0
        while have < size:
            # Small bites: four bytes of zstd can hold 128 KiB of text.
            data = self._rest or self._raw.read(self._bite)
            self._rest = b""
            if not data:
                if self._started and not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                break
            if self._frame.eof:
                self._frame = self._new()
            self._started = True
            parts.append(self._frame.decompress(data))
            have += len(parts[-1])
            if len(parts[-1]) > 1 << 20:
                self._bite = max(64, self._bite // 8)
            elif len(parts[-1]) < 1 << 18:
                self._bite = min(4096, self._bite * 2)
            if self._frame.eof:
                self._rest = self._frame.unused_data
        return b"".join(parts)

    def seek(self, offset: int, /) -> int:
        raise OSError("not seekable")

    def readline(self, limit: int, /) -> bytes:
        raise OSError("not seekable")


def _parquet(path: str) -> Any:
    pyarrow = need("pyarrow.parquet", "parquet") and need("pyarrow", "parquet")
    try:
        # Without a buffer, a whole column of a row group is read at once.
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise EnvironmentFault(f"not a parquet file: {error}", where=path) from None
