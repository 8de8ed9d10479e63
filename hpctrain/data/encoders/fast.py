"""The fast encoder: gigatoken, given only the pieces that text can become, for BPE models where it
equals SentencePiece.

Three defences keep it exact. `unsuited` refuses models whose structure it does not follow. A
self-check at start compares ids on spans of the data and on a fuzz set made from the model's own
pieces. Later every 500th span is compared again. Any span that comes back with a control id goes to
SentencePiece.

Why the merges can be equal: SentencePiece's BPE merges the adjacent pair whose concatenation has
the best score, leftmost first (bpe_model.cc, SampleEncode). Ranked merges do the same when every
character of a piece is a piece itself and pieces of one score never compete for a symbol
(`ties.py`). Control, unknown and byte pieces take no part in merges, so `<|user|>` in text stays
text. A character that no merge holds separates texts as if each were encoded alone: NUL, since
spans that hold one go to SentencePiece. User-defined pieces are added tokens: the longest that
begins at a character is one symbol that merges with none, here as there.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.encoders import memory
from hpctrain.data.encoders.reference import (
    EncoderDisagrees,
    never_from_text,
    processor,
    unknown_id,
)
from hpctrain.data.encoders.ties import tied_pieces_meet, tied_runs
from hpctrain.data.spm import BYTE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmModel

# gigatoken 0.10 never forgets a word (its issue #36), so the encoder is made anew when the process
# has grown by this much since the first one was made: the cache of a large input is no larger than
# that of a small one.
CACHE_BYTES = 96 << 20
CHECK_EVERY = 500
CHECK_BYTES = 200_000
_SPACE = "▁"
_SPACE_UTF8 = _SPACE.encode()

# Texts, each behind a NUL, to ids, with the separator's id for each NUL.
Engine = Callable[[bytes], "NDArray[Any]"]


def unsuited(model: SpmModel) -> str:
    """Why the fast encoder cannot be exact, or not faster, for `model`; or nothing."""
    if model.model_type != "bpe":
        return f"the model is {model.model_type}, and no faster encoder gives the same ids"
    if not model.escape_whitespaces or model.suffix_whitespace:
        return "the model treats whitespace in an unusual way"
    if UNUSED in model.types:
        return "the model has unused pieces"
    if model.byte_fallback and model.types.count(BYTE) != 256:
        return "the model lacks byte pieces"
    return _unsuited_pieces(model)


def _unsuited_pieces(model: SpmModel) -> str:
    normal = model.ids_of_type(NORMAL)
    scores = {model.pieces[index]: model.scores[index] for index in normal}
    if len(scores) != len(normal):
        return "a piece appears twice"
    if any("\0" in piece for piece in scores):
        return "a piece holds a NUL"
    if not set("".join(scores)) <= scores.keys():
        return "a piece has a character that is no piece itself"
    if any(_SPACE in piece.lstrip(_SPACE) for piece in scores):
        # gigatoken looks up words; where they go on after a space it takes a whole text for one
        # word.
        return "a piece goes on after a space, where sentencepiece is the faster one"
    if tied_pieces_meet(scores):
        return "pieces of the same score compete for the same text"
    return ""


@contextlib.contextmanager
def _failing_over() -> Iterator[None]:
    """Whatever fails inside is EncoderDisagrees to the caller, who then takes the reference; a
    missing gigatoken stays one.
    """
    try:
        yield
    except (EncoderDisagrees, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no `Exception` (pyo3's PanicException)
        if isinstance(error, ModuleNotFoundError) and error.name == "gigatoken":
            raise
        text = f"gigatoken failed: {type(error).__name__}: {error}"
        raise EncoderDisagrees(text[:300]) from error


class FastEncoder:
    """gigatoken for one model, by its public calls.

    Raises ModuleNotFoundError when it is not installed; EncoderDisagrees when it fails in any way,
    or the self-check does.
    """

    @_failing_over()
    def __init__(self, model: SpmModel, samples: Sequence[str], *, seed: int = 1):
        self._separator = _separator_id(model)
        self._forbidden = np.concatenate([never_from_text(model), np.zeros(257, dtype=bool)])
        self._json = tokenizer_json(model)
        self._encode = self._new_engine()
        self.name = f"gigatoken {_version()}"
        self._sp = processor(model)
        self._normalizes = bool(model.charsmap) or model.remove_extra_whitespaces
        self._before = b"\0 " if model.add_dummy_prefix and not self._normalizes else b"\0"
        self._unknown = unknown_id(model)
        self._vocab_size = model.vocab_size
        self._byte_fallback = model.byte_fallback
        self.fallbacks = 0
        self._countdown = CHECK_EVERY
        checked = self._self_check([*_some(samples), *fuzz(model, seed)])
        self._limit = memory.resident_bytes() + CACHE_BYTES
        self.notes: tuple[str, ...] = (f"self-check: {checked} spans equal to sentencepiece",)

    @_failing_over()
    def encode(self, spans: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As `Encoder.encode`. Raises EncoderDisagrees when gigatoken fails or a spot check
        does."""
        if memory.resident_bytes() > self._limit:
            self._renew()
        ids, lengths = self._encode_all(spans)
        chosen = range(self._countdown, len(spans), CHECK_EVERY)
        self._countdown += len(chosen) * CHECK_EVERY - len(spans)
        self._compare(spans, ids, lengths, chosen)
        return ids, lengths

    def _encode_all(self, spans: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All in one call, with separators between, as a call costs as much as 100 bytes of
        text."""
        if not spans:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        odd = {index for index, span in enumerate(spans) if "\0" in span}
        plain = ["" if "\0" in span else span for span in spans]
        text = self._normalized(plain if odd else spans)
        if text[:1] in (b"", b"\0") or text[-1:] == b"\0" or b"\0\0" in text:
            # Where nothing is left of a span, SentencePiece may still give a lone dummy prefix.
            odd.update(index for index, part in enumerate(text.split(b"\0")) if not part)
        flat = self._encode(self._before + text.replace(b"\0", self._before))
        begins = np.flatnonzero(flat == self._separator)
        if len(begins) != len(spans) or begins[0]:
            raise EncoderDisagrees("it lost the border between two spans")
        lengths = np.diff(begins, append=len(flat)) - 1
        flat = np.delete(flat, begins)
        forbidden = np.flatnonzero(self._forbidden[flat])
        if len(forbidden):
            ends = np.cumsum(lengths)
            odd.update(np.searchsorted(ends, forbidden, side="right").tolist())
        if not self._byte_fallback:
            flat, lengths = self._unknowns(flat, lengths)
        ids = flat.astype(np.int32, copy=False)
        return self._with(ids, lengths, spans, sorted(odd)) if odd else (ids, lengths)

    def _normalized(self, spans: Sequence[str]) -> bytes:
        """The texts as the model's rules make them, joined by NULs; with plain spaces, which
        SentencePiece escapes.
        """
        texts = self._sp.normalize(list(spans)) if self._normalizes else spans
        return "\0".join(texts).encode().replace(_SPACE_UTF8, b" ")

    def _new_engine(self) -> Engine:
        import gigatoken

        engine: Engine = gigatoken.Tokenizer.from_json(self._json).encode
        return engine

    def _with(
        self,
        flat: NDArray[np.int32],
        lengths: NDArray[np.int64],
        spans: Sequence[str],
        odd: Sequence[int],
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The same, with what SentencePiece makes of the spans `odd` in the place of what is
        there."""
        self.fallbacks += len(odd)
        ends = np.cumsum(lengths).tolist()
        parts: list[NDArray[np.int32]] = []
        at = 0
        for index in odd:
            right = np.array(self._sp.encode(spans[index]), dtype=np.int32)
            end = ends[index]
            parts += [flat[at : end - int(lengths[index])], right]
            at, lengths[index] = end, len(right)
        return np.concatenate([*parts, flat[at:]]), lengths

    def _unknowns(
        self, flat: NDArray[Any], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Without byte fallback, bytes of unknown characters (ids past the vocabulary) become one
        unknown a run.
        """
        strange = flat >= self._vocab_size
        if not strange.any():
            return flat, lengths
        ends = np.cumsum(lengths)
        flat = flat.copy()
        flat[strange] = self._unknown
        strange = flat == self._unknown
        repeated = strange.copy()
        repeated[1:] &= strange[:-1]
        repeated[:1] = False
        begins = (ends - lengths)[lengths > 0]
        repeated[begins] = False
        before = np.concatenate([[0], np.cumsum(repeated)])
        return flat[~repeated], lengths - (before[ends] - before[ends - lengths])

    def _compare(
        self,
        spans: Sequence[str],
        ids: NDArray[np.int32],
        lengths: NDArray[np.int64],
        chosen: Sequence[int],
    ) -> None:
        """Raises EncoderDisagrees unless the ids of the `chosen` spans are SentencePiece's."""
        if not chosen:
            return
        ends = np.cumsum(lengths)
        right = self._sp.encode([spans[index] for index in chosen], num_threads=1)
        for index, wanted in zip(chosen, right):
            end = int(ends[index])
            if ids[end - int(lengths[index]) : end].tolist() != wanted:
                raise EncoderDisagrees(
                    f"it gave other ids than sentencepiece for {spans[index][:60]!r}"
                )

    def _self_check(self, spans: list[str]) -> int:
        self._compare(spans, *self._encode_all(spans), range(len(spans)))
        self.fallbacks = 0
        return len(spans)

    def _renew(self) -> None:
        """A new engine with an empty cache, in the place of the old one: `_limit` stays what it was
        at the start.
        """
        del self._encode
        memory.give_back()
        self._encode = self._new_engine()
        # Should the process still be as large (by what others in it hold), it must not come to this
        # at every call.
        self._limit = max(self._limit, memory.resident_bytes() + CACHE_BYTES // 4)


def tokenizer_json(model: SpmModel) -> bytes:
    """A tokenizer.json of `model` in which only normal pieces can come out of text; ids are the
    model's own.

    Without byte fallback, 256 byte pieces are added past the vocabulary, to mark unknown
    characters. NUL is the last piece, and joins no other: it separates spans.
    """
    vocab: dict[str, int] = {}
    normal: dict[str, int] = {}
    added: list[dict[str, object]] = []
    has_bytes = model.byte_fallback
    for index, (piece, kind) in enumerate(zip(model.pieces, model.types)):
        if kind == NORMAL:
            normal[piece] = vocab[piece] = index
        elif kind == UNKNOWN or (kind == BYTE and has_bytes):
            vocab.setdefault(piece, index)
        elif kind == USER_DEFINED and piece and " " not in piece and "\0" not in piece:
            # Normalized text has no plain space, so that a piece with one never comes out of it.
            vocab[piece] = index
            added.append(_added_token(piece, index))
        else:
            # Two noncharacters, so that no text and no merge can make it.
            vocab[f"\U0010ffff{index}\U0010ffff"] = index
    if not has_bytes:
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = model.vocab_size + byte
    vocab["\0"] = _separator_id(model)
    # Best score first; models list their pieces so, which makes this sort quick.
    by_score = sorted(normal, key=lambda piece: -model.scores[normal[piece]])
    merges = [
        (left, right)
        for piece in by_score
        for cut in range(1, len(piece))
        if (right := piece[cut:]) in normal and (left := piece[:cut]) in normal
    ]
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[unknown_id(model)],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    whole: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
    }
    rest = {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": bpe}
    data = {**whole, "normalizer": {"type": "Sequence", "normalizers": normalizers}, **rest}
    try:
        import orjson
    except ImportError:
        return json.dumps(data, ensure_ascii=False).encode()
    return orjson.dumps(data)


def _added_token(piece: str, index: int) -> dict[str, object]:
    """As it stands in the text that the engine gets, before its normalizer."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": piece.replace(_SPACE, " "), **flags}


def _separator_id(model: SpmModel) -> int:
    return model.vocab_size + (0 if model.byte_fallback else 256)


def fuzz(model: SpmModel, seed: int, count: int = 1500) -> Iterator[str]:
    """Hostile spans: the model's pieces glued at random, borders that could merge two ways, runs,
    control pieces, odd spaces.
    """
    rng = random.Random(seed)
    pieces = [piece.replace(_SPACE, " ") for piece in model.pieces]
    normal = [
        piece.replace(_SPACE, " ")
        for piece, kind in zip(model.pieces, model.types)
        if kind == NORMAL
    ]
    special = [piece for piece, kind in zip(pieces, model.types) if kind != NORMAL]
    known = set(normal)
    bordered = [
        piece[:cut] + piece
        for piece in rng.sample(normal, min(4000, len(normal)))
        for cut in range(1, len(piece))
        if piece[cut:] in known
        and piece[: len(piece) - cut] == piece[cut:]
        and piece[:cut] in known
    ]
    yield from bordered[:500]
    yield from [
        "\x00",
        " ",
        "  ",
        "\n",
        "\t\t",
        " a",
        "a ",
        "a\nb",
        "\u200b",
        "\ufeff",
        "e\u0301",
        "\U0010ffff7\U0010ffff",
    ]
    scores = {model.pieces[index]: model.scores[index] for index in model.ids_of_type(NORMAL)}
    for char, longest in tied_runs(scores).items():
        run = char.replace(_SPACE, " ")
        yield from (run * length for length in range(1, 3 * longest + 2))
        yield from (run * length + rng.choice(normal) for length in range(1, longest + 2))
    for _ in range(count):
        kind = rng.randrange(6)
        if kind <= 1:
            yield "".join(rng.choices(normal, k=rng.randint(1, 12)))
        elif kind == 2:
            yield "".join(
                rng.choices(normal, k=rng.randint(0, 4)) + rng.choices(special, k=rng.randint(1, 2))
            )
        elif kind == 3:
            yield rng.choice(normal) * rng.randint(2, 20)
        elif kind == 4:
            spaces = ["", " ", "  ", "   ", "\n", "\t", "\u00a0", "\u3000", _SPACE, "\r\n"]
            yield "".join(rng.choice(normal) + rng.choice(spaces) for _ in range(rng.randint(1, 6)))
        else:
            low, high = rng.choice([(1, 127), (128, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x10FFFF)])
            yield "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))


def _some(samples: Sequence[str]) -> Iterator[str]:
    left = CHECK_BYTES
    for span in samples:
        left -= len(span)
        if left < 0:
            break
        yield span


def _version() -> str:
    """The installed version of gigatoken, nothing where only its files are there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gigatoken")
    except PackageNotFoundError:
        return ""
