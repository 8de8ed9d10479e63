"""The Megatron/NeoX indexed dataset (see header.py), opened, written and verified."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.data.dataset.header import DTYPES, HEADER_BYTES, MAGIC, paths

_CODES = {name: code for code, name in DTYPES.items()}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Dataset:
    """An open dataset. `sizes` are tokens per sequence, `pointers` byte offsets into `.bin`; all
    arrays are memory maps."""

    prefix: str
    dtype: str
    sizes: NDArray[Any]
    pointers: NDArray[Any]
    doc_idx: NDArray[Any]
    tokens: NDArray[Any]

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> NDArray[Any]:
        begin = int(self.pointers[index]) // self.tokens.dtype.itemsize
        return self.tokens[begin : begin + int(self.sizes[index])]


def open_dataset(prefix: str) -> Dataset:
    """The dataset at `prefix`, mapped, its header and sizes checked. Raises EnvironmentFault or
    UsageError, naming the file."""
    bin_path, idx_path = paths(prefix)
    try:
        with open(idx_path, "rb") as file:
            header = file.read(HEADER_BYTES)
            idx_size = os.fstat(file.fileno()).st_size
        bin_size = os.stat(bin_path).st_size
    except OSError as error:
        hint = _missing_hint(prefix) if error.errno == errno.ENOENT else ""
        raise EnvironmentFault(
            f"cannot be read: {error.strerror}", where=str(error.filename), hint=hint
        ) from None
    if len(header) < HEADER_BYTES:
        raise UsageError(
            f"{len(header)} bytes are too few for an .idx: truncated or never written",
            where=idx_path,
        )
    if header[:9] != MAGIC:
        raise UsageError(
            "not an .idx of an indexed dataset (its first bytes are wrong)", where=idx_path
        )
    version, code, num_sizes, num_docs = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in DTYPES:
        wrong = f"version {version} of the format" if version != 1 else f"dtype code {code}"
        raise UsageError(
            f"{wrong} is not known", where=idx_path, hint="Megatron and GPT-NeoX write version 1"
        )
    if DTYPES[code].startswith("float"):
        raise UsageError(f"its tokens are {DTYPES[code]}: ids are whole numbers", where=idx_path)
    want = HEADER_BYTES + 12 * num_sizes + 8 * num_docs
    if idx_size != want:
        raise UsageError(
            f"{idx_size} bytes, but its header says {want}: truncated or damaged", where=idx_path
        )
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    if bin_size % dtype.itemsize:
        hint = "is the copy complete, and does the .idx belong to this .bin?"
        raise UsageError(
            f"{bin_size} bytes are no whole number of {dtype.name} tokens",
            where=bin_path,
            hint=hint,
        )
    at = HEADER_BYTES

    def mapped(path: str, kind: Any, count: int, offset: int) -> NDArray[Any]:
        # mmap refuses an empty file.
        return np.memmap(path, kind, "r", offset, (count,)) if count else np.zeros(0, kind)

    sizes = mapped(idx_path, "<i4", num_sizes, at)
    pointers = mapped(idx_path, "<i8", num_sizes, at + 4 * num_sizes)
    doc_idx = mapped(idx_path, "<i8", num_docs, at + 12 * num_sizes)
    tokens = mapped(bin_path, dtype, bin_size // dtype.itemsize, 0)
    return Dataset(paths(prefix)[0][:-4], DTYPES[code], sizes, pointers, doc_idx, tokens)


def _missing_hint(prefix: str) -> str:
    """What to do when a file of a dataset is not there."""
    bin_path, idx_path = paths(prefix)
    if os.path.exists(paths(prefix + "_text_document")[1]):
        return f"did you mean {prefix}_text_document?"
    if os.path.exists(bin_path):
        return (
            "its .bin is there: the index comes last, so what made them was stopped; run that again"
        )
    if os.path.exists(idx_path):
        return "its .idx is there: was only that copied?"
    return "give the path without .bin or .idx"


def write_index(
    file: IO[bytes], dtype: str, sizes: Iterator[NDArray[Any]], num_sequences: int
) -> int:
    """Write a whole `.idx` for sequences of `sizes` (int32 chunks, in order), one document each;
    the number of tokens.

    Memory stays small for any number of sequences: pointers go to their place while the sizes pass
    by.
    """
    itemsize = np.dtype(dtype).itemsize
    file.write(MAGIC + struct.pack("<QBQQ", 1, _CODES[dtype], num_sequences, num_sequences + 1))
    sizes_at = HEADER_BYTES
    pointers_at = sizes_at + 4 * num_sequences
    total = done = 0
    for chunk in sizes:
        file.seek(sizes_at + 4 * done)
        file.write(np.ascontiguousarray(chunk, "<i4").tobytes())
        ends = np.cumsum(chunk, dtype=np.int64)
        file.seek(pointers_at + 8 * done)
        file.write(((ends - chunk + total) * itemsize).astype("<i8").tobytes())
        total += int(ends[-1]) if len(ends) else 0
        done += len(chunk)
    assert done == num_sequences
    file.seek(pointers_at + 8 * num_sequences)
    for begin in range(0, num_sequences + 1, _CHUNK):
        file.write(np.arange(begin, min(begin + _CHUNK, num_sequences + 1), dtype="<i8").tobytes())
    return total


def chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """`array` in pieces of a million entries."""
    for begin in range(0, len(array), _CHUNK):
        yield array[begin : begin + _CHUNK]


def verify(
    dataset: Dataset, vocab_size: int | None = None, eod_id: int | None = None
) -> list[Problem]:
    """Everything wrong inside a dataset that opened: gaps, lengths, document index, ids past the
    vocabulary, missing EOD."""
    problems = [*_wrong_sequences(dataset), *_wrong_documents(dataset)]
    if vocab_size is not None:
        problems += _foreign_ids(dataset, vocab_size)
    if eod_id is not None and not problems and len(dataset):
        problems += _without_end(dataset, eod_id)
    return problems


def _wrong_sequences(dataset: Dataset) -> Iterator[Problem]:
    """Empty sequences, pointers that leave gaps, tokens that the index does not count."""
    bin_path, idx_path = paths(dataset.prefix)
    itemsize = dataset.tokens.dtype.itemsize
    total = 0
    for begin in range(0, len(dataset), _CHUNK):
        sizes = dataset.sizes[begin : begin + _CHUNK].astype(np.int64)
        if (sizes <= 0).any():
            first = begin + int(np.argmax(sizes <= 0))
            what = f"sequence {first} has {int(dataset.sizes[first])} tokens"
            yield Problem(what, where=idx_path)
        want = (np.cumsum(sizes) - sizes + total) * itemsize
        wrong = dataset.pointers[begin : begin + _CHUNK] != want
        if wrong.any():
            first = begin + int(np.argmax(wrong))
            yield Problem(f"the pointer of sequence {first} is wrong", where=idx_path)
            break
        total += int(sizes.sum())
    if total != dataset.num_tokens:
        what = f"the index counts {total} tokens, the file has {dataset.num_tokens}"
        yield Problem(what, where=bin_path)


def _wrong_documents(dataset: Dataset) -> Iterator[Problem]:
    begins = range(0, len(dataset.doc_idx), _CHUNK)
    pieces = ((begin, dataset.doc_idx[begin : begin + _CHUNK]) for begin in begins)
    if len(dataset.doc_idx) != len(dataset) + 1 or not all(
        (piece == np.arange(begin, begin + len(piece))).all() for begin, piece in pieces
    ):
        what, why = "the document index is not 0..n", "one document is one sequence"
        yield Problem(what, where=paths(dataset.prefix)[1], why=why, level="warning")


def _foreign_ids(dataset: Dataset, vocab_size: int) -> Iterator[Problem]:
    for begin in range(0, dataset.num_tokens, 16 * _CHUNK):
        part = dataset.tokens[begin : begin + 16 * _CHUNK]
        if int(part.max()) >= vocab_size or int(part.min()) < 0:
            where = f"{paths(dataset.prefix)[0]}: token {begin}+"
            yield Problem(f"an id outside the vocabulary of {vocab_size}", where=where)
            return


def _without_end(dataset: Dataset, eod_id: int) -> Iterator[Problem]:
    ends = dataset.pointers // dataset.tokens.dtype.itemsize + dataset.sizes - 1
    without = dataset.tokens[ends] != eod_id
    if without.any():
        yield Problem(
            f"{int(without.sum())} of {len(dataset)} sequences do not end with id {eod_id}",
            where=paths(dataset.prefix)[0],
            hint=f"the first is sequence {int(np.argmax(without))}",
        )
