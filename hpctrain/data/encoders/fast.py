"""The fast encoder, given only the pieces that text can become, for models where it equals SentencePiece: gigatoken for BPE, the
merges of `bpe.py` where its pieces go across spaces, the search of `unigram.py` for unigram models.

Three defences keep it exact. `unsuited` refuses models whose structure it does not follow. A self-check at start compares ids
on spans of the data and on a fuzz set made from the model's own pieces. Later every 500th span is compared again. Any span that
comes back with a control id goes to SentencePiece, and with unigram models those that spell a user-defined piece.

Why the merges can be equal: SentencePiece's BPE merges the adjacent pair whose concatenation has the best score, leftmost first
(bpe_model.cc, SampleEncode). Ranked merges do the same when every character of a piece is a piece itself and no two pieces
share a score. Control, unknown and byte pieces take no part in merges, so `<|user|>` in text stays text. A character that no
merge holds separates texts as if each were encoded alone: NUL, since spans that hold one go to SentencePiece. User-defined
pieces separate texts too: the longest one that begins at a character is one symbol that merges with none (`freeze` there).
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hpctrain.data.encoders import memory
from hpctrain.data.encoders.normalize import make_normalizer
from hpctrain.data.encoders.reference import EncoderDisagrees, never_from_text, processor, unknown_id
from hpctrain.data.spm import BYTE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# NUL-separated texts to ids, with the separator's id for each NUL.
Engine = Callable[[bytes], "NDArray[Any]"]

# gigatoken 0.10 never forgets a word (its issue #36), so the encoder is made anew when the process has grown by this much
# since the first one was made: the cache of a large input is no larger than that of a small one.
CACHE_BYTES = 96 << 20
CHECK_EVERY = 500
CHECK_BYTES = 200_000
_SPACE = "▁"
_SPACE_UTF8 = _SPACE.encode()


def unsuited(model: SpmModel) -> str:
    """Why the fast encoder cannot be exact for `model`, or nothing."""
    if model.model_type not in ("bpe", "unigram"):
        return f"the model is {model.model_type}, and no faster encoder gives the same ids"
    if not model.escape_whitespaces or (model.suffix_whitespace and model.model_type == "unigram"):
        return "the model treats whitespace in an unusual way"
    return _unsuited_unigram(model) if model.model_type == "unigram" else _unsuited_bpe(model)


def compiles(model: SpmModel) -> bool:
    """Whether the fast encoder for `model` is compiled when it starts, which takes seconds."""
    return model.model_type == "unigram" or crosses_spaces(model)


def crosses_spaces(model: SpmModel) -> bool:
    """Whether a piece goes on after a word's end, so that words cannot be looked up one by one."""
    return any(_SPACE in model.pieces[index].lstrip(_SPACE) for index in model.ids_of_type(NORMAL))


def _unsuited_unigram(model: SpmModel) -> str:
    normal = model.ids_of_type(NORMAL)
    if not normal or not all(math.isfinite(score) for score in model.scores):
        return "a score is no number"
    if any(char in model.pieces[index] for index in normal for char in ("\0", " ")):
        return "a piece holds a NUL or a space"
    if model.byte_fallback and model.types.count(BYTE) != 256:
        return "the model lacks byte pieces"
    if model.byte_fallback and not any(model.pieces[index] == _SPACE for index in normal):
        return "the space is no piece"
    # Earlier ones add some scores in float64, which rounds otherwise.
    if _release("sentencepiece") < (0, 2, 3):
        return "sentencepiece before 0.2.3 rounds in another way"
    return ""


def _unsuited_bpe(model: SpmModel) -> str:
    if UNUSED in model.types:
        return "the model has unused pieces"
    normal = [index for index, kind in enumerate(model.types) if kind == NORMAL]
    known = {model.pieces[index] for index in normal}
    if len(known) != len(normal):
        return "a piece appears twice"
    long = [index for index in normal if len(model.pieces[index]) > 1]
    if len({model.scores[index] for index in long}) != len(long):
        return "two pieces have the same score"
    if any("\0" in piece for piece in known):
        return "a piece holds a NUL"
    if not set("".join(known)) <= known:
        return "a piece has a character that is no piece itself"
    if model.byte_fallback and model.types.count(BYTE) != 256:
        return "the model lacks byte pieces"
    return ""


class FastEncoder:
    """The fast engine for one model. Raises ImportError when not installed, EncoderDisagrees when the self-check fails."""

    def __init__(self, model: SpmModel, samples: Sequence[str], *, seed: int = 1):
        import numpy as np

        memory.keep()
        self._separator = _separator_id(model)
        give_up = self._separator + 1  # an engine's word for a span that it leaves to SentencePiece
        self._forbidden = np.concatenate([never_from_text(model), np.zeros(258, dtype=bool)])
        self._forbidden[give_up] = True
        # What makes the engine anew, with an empty cache; nothing, where there is no cache.
        self._anew: Callable[[], Engine] | None = None
        if model.model_type == "unigram":
            from hpctrain.data.encoders.unigram import Viterbi

            self._encode: Engine = Viterbi(model, self._separator, give_up).encode
            self.name = f"compiled search, numba {_version('numba')}"
        elif crosses_spaces(model):
            from hpctrain.data.encoders.bpe import Merges

            self._encode = Merges(model, self._separator, give_up).encode
            self.name = f"compiled merges, numba {_version('numba')}"
        else:
            import gigatoken

            data = tokenizer_json(model)
            self._anew = lambda: gigatoken.Tokenizer.from_json(data).backend.encode
            self._encode = self._anew()
            self.name = f"gigatoken {_version('gigatoken')}"
        self._sp = processor(model)
        self._before, self._after = b"\0", b""
        if model.add_dummy_prefix and model.suffix_whitespace:
            self._after = b" "
        elif model.add_dummy_prefix:
            self._before = b"\0 "
        self._unknown = unknown_id(model)
        self._vocab_size = model.vocab_size
        self._byte_fallback = model.byte_fallback
        # Normalized text has no plain space, so a piece with one never comes out of it.
        self._defined_ids = {
            model.pieces[index].replace(_SPACE, " ").encode(): index
            for index in model.ids_of_type(USER_DEFINED)
            if " " not in model.pieces[index]
        }
        self._defined = re.compile(any_of(self._defined_ids)) if self._defined_ids else None
        self._splits = model.model_type == "bpe"
        self._normalize = make_normalizer(model, self._sp)
        self.fallbacks = 0
        self._countdown = CHECK_EVERY
        checked = self._self_check([*_some(samples), *fuzz(model, seed)])
        self._limit = memory.resident_bytes() + CACHE_BYTES
        self.notes: tuple[str, ...] = (f"self-check: {checked} spans equal to sentencepiece",)

    def encode(self, spans: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As `Encoder.encode`. Raises EncoderDisagrees when a spot check fails."""
        if self._anew and memory.resident_bytes() > self._limit:
            self._renew(self._anew)
        ids, lengths = self._encode_all(spans)
        chosen = range(self._countdown, len(spans), CHECK_EVERY)
        self._countdown += len(chosen) * CHECK_EVERY - len(spans)
        self._compare(spans, ids, lengths, chosen)
        return ids, lengths

    def _encode_all(self, spans: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All spans in one call, with separators between them, as a call costs as much as some hundred bytes of text."""
        import numpy as np

        if not spans:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        odd = {index for index, span in enumerate(spans) if "\0" in span}
        text = self._normalize(["" if "\0" in span else span for span in spans] if odd else spans)
        find = self._defined.search if self._defined and not self._splits else None
        if find or text[:1] in (b"", b"\0") or text[-1:] == b"\0" or b"\0\0" in text:
            # Where nothing is left of a span, SentencePiece may still give a lone dummy prefix. A normalizer may turn other
            # text into a user-defined piece, and the dummy prefix may be the start of one.
            parts = text.split(b"\0")
            odd.update(
                i for i, part in enumerate(parts) if not part or (find and find(b" " + part.replace(_SPACE_UTF8, b" ")))
            )
        flat, begins = self._between_defined(
            self._before + text.replace(b"\0", self._after + self._before) + self._after
        )
        if len(begins) != len(spans) or begins[0]:
            raise EncoderDisagrees("it lost the border between two spans")
        lengths = np.diff(begins, append=len(flat)) - 1
        flat = np.delete(flat, begins)
        forbidden = np.flatnonzero(self._forbidden[flat])
        if len(forbidden):
            odd.update(np.searchsorted(np.cumsum(lengths), forbidden, side="right").tolist())
        if not self._byte_fallback:
            flat, lengths = self._unknowns(flat, lengths)
        ids = flat.astype(np.int32, copy=False)
        return self._with(ids, lengths, spans, sorted(odd)) if odd else (ids, lengths)

    def _between_defined(self, text: bytes) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(ids, where the separators of spans are in them) of NUL-separated texts; user-defined pieces are cut out first."""
        import numpy as np

        if self._defined and self._splits:
            text = text.replace(_SPACE_UTF8, b" ")
            found = self._defined.findall(text)
            if found:
                data = np.frombuffer(self._defined.sub(b"\xff", text), np.uint8)  # a byte that UTF-8 never has
                is_defined = data[(data == 0) | (data == 0xFF)] == 0xFF
                flat = self._encode(data.tobytes().replace(b"\xff", b"\0"))
                begins = np.flatnonzero(flat == self._separator)
                if len(begins) != len(is_defined):
                    raise EncoderDisagrees("it lost the border between two spans")
                flat = flat.copy()
                flat[begins[is_defined]] = [self._defined_ids[piece] for piece in found]
                return flat, begins[~is_defined]
        flat = self._encode(text)
        return flat, np.flatnonzero(flat == self._separator)

    def _with(
        self, flat: NDArray[np.int32], lengths: NDArray[np.int64], spans: Sequence[str], odd: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The same, with what SentencePiece makes of the spans `odd` in the place of what is there."""
        import numpy as np

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

    def _unknowns(self, flat: NDArray[Any], lengths: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Without byte fallback, bytes of unknown characters (ids past the vocabulary) become one unknown a run."""
        import numpy as np

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
        self, spans: Sequence[str], ids: NDArray[np.int32], lengths: NDArray[np.int64], chosen: Sequence[int]
    ) -> None:
        """Raises EncoderDisagrees unless the ids of the `chosen` spans are SentencePiece's."""
        import numpy as np

        if not chosen:
            return
        ends = np.cumsum(lengths)
        for index, right in zip(chosen, self._sp.encode([spans[index] for index in chosen], num_threads=1)):
            end = int(ends[index])
            if ids[end - int(lengths[index]) : end].tolist() != right:
                raise EncoderDisagrees(f"it gave other ids than sentencepiece for {spans[index][:60]!r}")

    def _self_check(self, spans: list[str]) -> int:
        self._compare(spans, *self._encode_all(spans), range(len(spans)))
        self.fallbacks = 0
        return len(spans)

    def _renew(self, anew: Callable[[], Engine]) -> None:
        """A new engine with an empty cache, in the place of the old one: `_limit` stays what it was at the start."""
        del self._encode
        memory.give_back()
        self._encode = anew()
        # Should the process still be as large (by what others in it hold), it must not come to this at every call.
        self._limit = max(self._limit, memory.resident_bytes() + CACHE_BYTES // 4)


def tokenizer_json(model: SpmModel) -> bytes:
    """A tokenizer.json of `model` in which only normal pieces can come out of text; ids are the model's own.

    Without byte fallback, 256 byte pieces are added past the vocabulary, to mark unknown characters. NUL is the last piece, and
    joins no other: it separates spans.
    """
    vocab: dict[str, int] = {}
    normal: dict[str, int] = {}
    has_bytes = model.byte_fallback
    for index, (piece, kind) in enumerate(zip(model.pieces, model.types)):
        if kind == NORMAL:
            normal[piece] = vocab[piece] = index
        elif kind == UNKNOWN or (kind == BYTE and has_bytes):
            vocab.setdefault(piece, index)
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
    whole: dict[str, object] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    rest = {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": bpe}
    data = {**whole, "normalizer": {"type": "Sequence", "normalizers": normalizers}, **rest}
    try:
        import orjson
    except ImportError:
        return json.dumps(data, ensure_ascii=False).encode()
    return orjson.dumps(data)


def any_of(words: Iterable[bytes]) -> bytes:
    """A pattern that matches the longest of `words` at a place; as fast for a hundred of them as for one."""
    following: dict[int, list[bytes]] = {}
    is_end = False
    for word in words:
        if word:
            following.setdefault(word[0], []).append(word[1:])
        else:
            is_end = True
    branches = [re.escape(bytes([first])) + any_of(rest) for first, rest in sorted(following.items())]
    if not branches:
        return b""
    return b"(?:" + b"|".join(branches) + b")" + (b"?" if is_end else b"")


def _separator_id(model: SpmModel) -> int:
    return model.vocab_size + (0 if model.byte_fallback else 256)


def fuzz(model: SpmModel, seed: int, count: int = 1500) -> Iterator[str]:
    """Hostile spans: the model's pieces glued at random, borders that could merge two ways, runs, control pieces, odd spaces."""
    rng = random.Random(seed)
    pieces = [piece.replace(_SPACE, " ") for piece in model.pieces]
    normal = [piece.replace(_SPACE, " ") for piece, kind in zip(model.pieces, model.types) if kind == NORMAL]
    special = [piece for piece, kind in zip(pieces, model.types) if kind != NORMAL]
    known = set(normal)
    bordered = [
        piece[:cut] + piece
        for piece in rng.sample(normal, min(4000, len(normal)))
        for cut in range(1, len(piece))
        if piece[cut:] in known and piece[: len(piece) - cut] == piece[cut:] and piece[:cut] in known
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
    for _ in range(count):
        kind = rng.randrange(6)
        if kind <= 1:
            yield "".join(rng.choices(normal, k=rng.randint(1, 12)))
        elif kind == 2:
            yield "".join(rng.choices(normal, k=rng.randint(0, 4)) + rng.choices(special, k=rng.randint(1, 2)))
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


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _release(package: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(_version(package)).release
