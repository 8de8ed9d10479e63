"""Reads an indexed dataset by memory map."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.errors import UsageError

_MAGIC = b"MMIDIDX\0\0"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float32, 7: np.float64, 8: np.uint16}


@dataclass(frozen=True)
class Indexed:
    """One dataset: `sizes` in tokens, and `read` for the tokens of one sequence."""

    prefix: str
    sizes: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]

    def read(self, index: int) -> npt.NDArray[Any]:
        begin = int(self.pointers[index]) // self.tokens.dtype.itemsize
        return self.tokens[begin : begin + int(self.sizes[index])]


def open_indexed(prefix: str) -> Indexed:
    """Open PREFIX.bin and PREFIX.idx. Raises UsageError when they are not a complete indexed dataset."""
    with open(prefix + ".idx", "rb") as file:
        header = file.read(34)
    if len(header) < 34 or header[:9] != _MAGIC:
        raise UsageError(f"`{prefix}.idx` is not an index of tokens", hint="make it with `hpctrain tokenize`")
    version, code, num_sequences, _ = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in _DTYPES:
        raise UsageError(f"`{prefix}.idx` has version {version} and type {code}, which this reader does not know")
    raw: npt.NDArray[Any] = np.memmap(prefix + ".idx", dtype=np.uint8, mode="r")
    if len(raw) < 34 + 12 * num_sequences:
        raise UsageError(f"`{prefix}.idx` is cut short", why=f"{num_sequences} sequences need more bytes")
    sizes = np.frombuffer(raw, dtype="<i4", count=num_sequences, offset=34)
    pointers = np.frombuffer(raw, dtype="<i8", count=num_sequences, offset=34 + 4 * num_sequences)
    dtype = np.dtype(_DTYPES[code])
    needed = int((pointers + sizes.astype(np.int64) * dtype.itemsize).max(initial=0))
    have = os.path.getsize(prefix + ".bin")
    if have < needed:
        raise UsageError(f"`{prefix}.bin` is cut short", why=f"it has {have} bytes, its index wants {needed}")
    tokens = np.memmap(prefix + ".bin", dtype=dtype, mode="r") if have else np.empty(0, dtype=dtype)
    return Indexed(prefix, sizes, pointers, tokens)
