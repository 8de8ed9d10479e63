"""A SentencePiece model file as data: pieces, scores, types and the options that decide how text
becomes ids.

Reads the protobuf itself (sentencepiece's `sentencepiece_model.proto`, 40 lines of wire format), so
that neither protobuf nor the model's trainer is needed. Never encodes anything.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from hpctrain.base.errors import EnvironmentFault, UsageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TYPE_NAMES = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}
_FLOAT = struct.Struct("<f")
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class SpmModel:
    """What a model file says. `pieces[i]`, `scores[i]`, `types[i]` belong to id i; `data` is the
    file itself."""

    path: str
    data: bytes
    sha256: str
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: bytes
    model_type: str
    byte_fallback: bool
    suffix_whitespace: bool
    normalizer: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @property
    def has_charsmap(self) -> bool:
        """Whether the normalizer changes more than spaces."""
        return bool(self.charsmap)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def ids_of_type(self, *types: int) -> list[int]:
        """The ids whose piece is of one of `types`, ascending."""
        return [index for index, kind in enumerate(self.types) if kind in types]


def load_model(path: str) -> SpmModel:
    """The model at `path`. Raises EnvironmentFault when unreadable, UsageError when it is not a
    SentencePiece model."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise EnvironmentFault("the tokenizer model is not a regular file", where=path)
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            return _load(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise EnvironmentFault(
            f"the tokenizer model cannot be read: {error.strerror}", where=path
        ) from None
    except (ValueError, IndexError, struct.error):
        raise UsageError(
            "this is not a SentencePiece model",
            where=path,
            hint="give the .model file, not tokenizer.json or .vocab",
        ) from None


@lru_cache(maxsize=1)
def _load(path: str, size: int, mtime_ns: int) -> SpmModel:
    with open(path, "rb") as file:
        return parse_model(file.read(), path)


def parse_model(data: bytes, path: str = "") -> SpmModel:
    """An SpmModel from the bytes of a .model file. Raises ValueError, IndexError or struct.error
    when malformed."""
    pieces: list[str] = []
    scores: list[float] = []
    types = bytearray()
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            piece, score, kind = _piece(value)
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
        elif field == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif field == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if not pieces or UNKNOWN not in types:
        raise ValueError("no pieces")
    return SpmModel(
        path=path,
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        pieces=tuple(pieces),
        scores=tuple(scores),
        types=bytes(types),
        model_type=_MODEL_TYPES.get(_int(trainer.get(3, 1)), "other"),
        byte_fallback=bool(trainer.get(35, 0)),
        suffix_whitespace=bool(trainer.get(24, 0)),
        normalizer=_bytes(normalizer.get(1, b"")).decode("utf-8", "replace"),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _piece(value: bytes) -> tuple[str, float, int]:
    """(piece, score, type) of a SentencePiece message; the usual order of fields is read without a
    loop."""
    end = 2 + value[1] if len(value) > 1 and value[0] == 0x0A and value[1] < 128 else 0
    if end and value[end : end + 1] == b"\x15":
        rest = len(value) - end - 5
        if rest == 0 or (rest == 2 and value[-2] == 0x18):
            return (
                value[2:end].decode("utf-8"),
                _FLOAT.unpack_from(value, end + 1)[0],
                value[-1] if rest else NORMAL,
            )
    fields = dict(_fields(value))
    score = _FLOAT.unpack(_bytes(fields.get(2, b"\0\0\0\0")))[0]
    return _bytes(fields.get(1, b"")).decode("utf-8"), score, _int(fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: ints for varints, bytes for everything
    else."""
    index, end = 0, len(data)
    while index < end:
        if (
            data[index] < 0x80
            and index + 1 < end
            and data[index] & 7 == 2
            and data[index + 1] < 0x80
        ):
            # The common case: a short string or message.
            key, length, index = data[index], data[index + 1], index + 2
            if index + length > end:
                raise ValueError("truncated")
            yield key >> 3, data[index : index + length]
            index += length
            continue
        key, index = _varint(data, index)
        wire = key & 7
        if wire == 0:
            number, index = _varint(data, index)
            yield key >> 3, number
            continue
        if wire == 2:
            length, index = _varint(data, index)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if index + length > end:
            raise ValueError("truncated")
        yield key >> 3, data[index : index + length]
        index += length


def _varint(data: bytes, index: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[index]
        index += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index
        shift += 7
        if shift > 63:
            raise ValueError("varint")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("expected bytes")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("expected a number")
    return value
