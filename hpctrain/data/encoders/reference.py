"""The reference encoder, SentencePiece itself, and what every encoder must promise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.base.errors import need
from hpctrain.data.spm import CONTROL, UNKNOWN, SpmModel


class Encoder(Protocol):
    """What `worker` needs. `name` goes into the manifest; `notes` say why it was chosen."""

    name: str
    notes: tuple[str, ...]
    fallbacks: int

    def encode(self, spans: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of all spans in one array, and how many belong to each."""
        ...


class EncoderDisagrees(Exception):
    """The fast encoder failed, or gave other ids: what it wrote so far is not to be trusted."""


class SentencePieceEncoder:
    """The reference: one `sp.encode` a span, with the model's own dummy prefix and
    normalization."""

    _BATCH = 2048

    def __init__(self, model: SpmModel, notes: tuple[str, ...] = ()):
        self.name = f"sentencepiece {_version()}"
        self.notes = notes
        self.fallbacks = 0
        sp = processor(model)
        # sentencepiece 0.2.1 gives arrays without a detour through Python integers.
        as_arrays = getattr(sp, "encode_as_numpy", None)
        self._batch: Callable[[list[str]], Iterable[NDArray[np.int32]]]
        if as_arrays:
            self._batch = lambda spans: as_arrays(_utf8(spans), num_threads=1)
        else:
            self._batch = lambda spans: [
                np.array(ids, np.int32) for ids in sp.encode(spans, out_type=int, num_threads=1)
            ]

    def encode(self, spans: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        arrays: list[NDArray[np.int32]] = []
        for begin in range(0, len(spans), self._BATCH):
            arrays += self._batch(list(spans[begin : begin + self._BATCH]))
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return flat.astype(np.int32, copy=False), lengths


def processor(model: SpmModel) -> Any:
    """A SentencePieceProcessor of `model`; the last one is kept, as loading a large model takes a
    tenth of a second.
    """
    if model.sha256 not in _processors:
        sentencepiece = need("sentencepiece", "all")
        _processors.clear()
        _processors[model.sha256] = sentencepiece.SentencePieceProcessor(model_proto=model.data)
    return _processors[model.sha256]


_processors: dict[str, Any] = {}


def never_from_text(model: SpmModel, forgeable: Sequence[int] = ()) -> NDArray[np.bool_]:
    """By id: whether encoded text must not hold it (control symbols, and `forgeable` user-defined
    ones).
    """
    mask = np.zeros(model.vocab_size, dtype=bool)
    mask[model.ids_of_type(CONTROL)] = True
    mask[list(forgeable)] = True
    return mask


def unknown_id(model: SpmModel) -> int:
    """The id of `<unk>`."""
    return model.ids_of_type(UNKNOWN)[0]


def _utf8(spans: Sequence[str]) -> list[bytes]:
    """All of them at once; given text, sentencepiece would convert each, and Python would keep
    both.
    """
    texts = "\0".join(spans).encode().split(b"\0")
    return texts if len(texts) == len(spans) else [span.encode() for span in spans]


def _version() -> str:
    return str(need("sentencepiece", "all").__version__)
