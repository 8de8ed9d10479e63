"""Indexed datasets against what the run says of them: index, masks, end of document, window,
epochs, tokenizer. Reads headers, some of the lengths, the first documents and the sidecar."""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.data.dataset.header import DTYPES, HEADER_BYTES, MAGIC, paths
from hpctrain.plan.look.reading import Reader
from hpctrain.recipes.facts import Indexed, Masks

MOST_EPOCHS = 10  # of fine-tuning; more is nearly always a number that belongs to other data
_CODES = {"uint8": "B", "int8": "b", "int16": "h", "uint16": "H", "int32": "i", "int64": "q"}
_STRETCHES = 16  # of lengths, spread over an index that is too long to read
_FIRST_TOKENS = 4096
_MOST_SHARE = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What was read of one dataset. `lengths` are of `looked_at` documents, all of them where
    `looked_at == documents`; `first` are the ids of the first whole documents."""

    prefix: str
    where: str
    documents: int
    tokens: int
    lengths: Sequence[int]
    first: tuple[Sequence[int], ...]
    sidecar: Mapping[str, Any]

    @property
    def control(self) -> Mapping[str, Any]:
        """What the sidecar says of control tokens; empty without one."""
        found = self.sidecar.get("control")
        return found if isinstance(found, dict) else {}

    @property
    def markers(self) -> dict[int, str]:
        """Control id -> the role whose turns it opens and closes."""
        tokens = self.control.get("tokens")
        return {
            token["id"]: str(token.get("role"))
            for token in (tokens if isinstance(tokens, list) else [])
            if isinstance(token, dict) and isinstance(token.get("id"), int)
        }


class Damaged(ValueError):
    """Why an index cannot be used."""


def problems(data: Indexed, reader: Reader) -> Iterator[Problem]:
    """Everything that the files contradict; files that are not here are told elsewhere."""
    share = min(reader.left // max(len(data.prefixes), 1) // 2, _MOST_SHARE)
    seen = []
    for prefix, where in data.prefixes:
        sizes = [reader.size(path) for path in paths(prefix)]
        if sizes[0] is None or sizes[1] is None:
            continue
        try:
            seen.append(_read(prefix, where, sizes[0], sizes[1], share, reader))
        except Damaged as error:
            hint = "hpctrain data verify tells more; make the pair again, or finish the copy"
            yield Problem(f"the index of `{prefix}` {error}", where, hint=hint)
        except OSError as error:
            yield Problem(f"`{error.filename}` cannot be read: {error.strerror}", where)
    for facts in seen:
        yield from _masks(data.masks, facts)
        yield from _end_of_document(data, facts)
        yield from _window(data, facts)
        yield from _vocabulary(data, facts, reader)
    yield from _tokenizer(data, seen, reader)
    if len(seen) == len(data.prefixes):
        yield from _epochs(data, seen)


def _read(
    prefix: str, where: str, bin_size: int, idx_size: int, share: int, reader: Reader
) -> Facts:
    bin_path, idx_path = paths(prefix)
    head = reader.read(idx_path, 0, HEADER_BYTES)
    if len(head) < HEADER_BYTES or head[:9] != MAGIC:
        raise Damaged("is none: its first bytes are wrong")
    version, code, documents, entries = struct.unpack("<QBQQ", head[9:])
    if version != 1 or DTYPES.get(code) not in _CODES:
        raise Damaged(f"has version {version} and dtype code {code}, which no trainer reads")
    if idx_size != HEADER_BYTES + 12 * documents + 8 * entries:
        raise Damaged(f"has {idx_size} bytes, and its header says another number: cut short?")
    kind = _CODES[DTYPES[code]]
    width = struct.calcsize(f"<{kind}")
    tokens, rest = divmod(bin_size, width)
    last = reader.read(idx_path, HEADER_BYTES + 12 * documents - 8, 8) if documents else b"\0" * 8
    lengths = _lengths(idx_path, documents, share, reader)
    end = struct.unpack("<q", last)[0] + (lengths[-1] * width if documents else 0)
    if rest or end != bin_size:
        raise Damaged(f"ends at byte {end}, and the .bin has {bin_size}: cut short, or another's")
    ids = _numbers(kind, reader.read(bin_path, 0, min(_FIRST_TOKENS * width, share)))
    first, begin = [], 0
    for length in lengths[:64]:
        if begin + length > len(ids):
            break
        first.append(ids[begin : begin + length])
        begin += length
    sidecar = reader.json(bin_path[:-4] + ".json") or {}
    return Facts(bin_path[:-4], where, documents, tokens, lengths, tuple(first), sidecar)


def _numbers(kind: str, data: bytes) -> array[int]:
    numbers = array(kind)
    numbers.frombytes(data[: len(data) // numbers.itemsize * numbers.itemsize])
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _lengths(idx_path: str, documents: int, share: int, reader: Reader) -> array[int]:
    """The lengths of all documents, or of stretches from the first to the last."""
    fits = max(share // 4, _STRETCHES)
    if documents <= fits:
        return _numbers("i", reader.read(idx_path, HEADER_BYTES, 4 * documents))
    stretch = fits // _STRETCHES
    found = array("i")
    for number in range(_STRETCHES):
        begin = (documents - stretch) * number // (_STRETCHES - 1)
        found += _numbers("i", reader.read(idx_path, HEADER_BYTES + 4 * begin, 4 * stretch))
    return found


def _masks(masks: Masks | None, facts: Facts) -> Iterator[Problem]:
    """Masks of other ids than the data's train prompts, or mask replies, without a word."""
    if masks is None or not (masks.pairs or masks.alternating or masks.individual):
        return
    known = facts.markers
    listed = ", ".join(f"{number} {role}" for number, role in known.items())
    rules = (
        ("loss_mask_pairs", masks.pairs, masks.where_pairs),
        ("loss_mask_alternating_individual", masks.alternating, masks.where_alternating),
        ("loss_mask_individual", masks.individual, masks.where_individual),
    )
    in_first = {number for ids in facts.first for number in ids}
    for key, ids, where in rules:
        strange = sorted(set(ids) - set(known)) if known else sorted(set(ids) - in_first)
        if not strange or not (known or facts.first):
            continue
        says = f"its control tokens are {listed}" if known else "none of its first documents has it"
        yield Problem(
            f"`{key}` names {', '.join(map(str, strange))}, which marks nothing in"
            f" `{facts.prefix}`",
            where,
            why=f"{says}; a mask that finds nothing trains on everything",
            hint=_right_masks(known),
            level="error" if known or key == "loss_mask_pairs" else "warning",
        )
    if known:
        yield from _roles(masks, facts, known)


def _roles(masks: Masks, facts: Facts, known: Mapping[int, str]) -> Iterator[Problem]:
    hint = _right_masks(known)
    pairs = list(zip(masks.pairs[::2], masks.pairs[1::2]))
    for opening, closing in pairs:
        if opening != closing:
            yield Problem(
                f"`loss_mask_pairs` masks from {opening} to {closing}, and a turn of"
                f" `{facts.prefix}` opens and closes with the same token",
                masks.where_pairs,
                why="what lies between the two is masked: the replies, or all of the row",
                hint=hint,
            )
        elif known.get(opening) == "assistant":
            yield Problem(
                f"`loss_mask_pairs` masks the replies: {opening} is the assistant's marker in"
                f" `{facts.prefix}`",
                masks.where_pairs,
                why="nothing of a reply would be trained",
                hint=hint,
            )
    masked = {opening for opening, closing in pairs if opening == closing}
    for number, role in known.items():
        if role != "assistant" and number not in masked and not set(masks.pairs) - set(known):
            yield Problem(
                f"the {role}'s turns of `{facts.prefix}` are trained on: no pair masks {number}",
                masks.where_pairs or masks.where_alternating,
                hint=hint,
                level="warning",
            )
    for number in sorted(set(masks.alternating) & set(known)):
        if known[number] != "assistant":
            yield Problem(
                f"`loss_mask_alternating_individual` names {number}, the {known[number]}'s marker;"
                " it is for the token that opens a reply",
                masks.where_alternating,
                hint=hint,
                level="warning",
            )


def _right_masks(known: Mapping[int, str]) -> str:
    asked = [number for number, role in known.items() if role != "assistant" for _ in range(2)]
    replies = [number for number, role in known.items() if role == "assistant"]
    if not known:
        return "`hpctrain data inspect` shows the data's ids"
    return f"loss_mask_pairs: {asked} and loss_mask_alternating_individual: {replies}"


def _end_of_document(data: Indexed, facts: Facts) -> Iterator[Problem]:
    if not data.needs_eod or not facts.documents:
        return
    last = {ids[-1] for ids in facts.first if len(ids)}
    lacks = facts.control.get("eod_id") is None if facts.control else len(last) > 1
    if lacks:
        yield Problem(
            f"the documents of `{facts.prefix}` do not end with an end-of-document token",
            facts.where,
            why=data.needs_eod,
            hint="tokenize it again with the token appended (`hpctrain tokenize` does by itself)",
        )


def _window(data: Indexed, facts: Facts) -> Iterator[Problem]:
    if not data.window:
        return
    longer = sum(1 for length in facts.lengths if length > data.window + 1)
    if not facts.documents:
        yield Problem(f"`{facts.prefix}` holds no document", facts.where)
    elif longer:
        looked_at = len(facts.lengths)
        of = f"the {looked_at:,} looked at of " if looked_at < facts.documents else ""
        fate = "are left out" if data.skips else "are cut"
        yield Problem(
            f"{longer:,} of {of}{facts.documents:,} documents of `{facts.prefix}` are longer than"
            f" a row of {data.window} tokens, and {fate}",
            data.where_window or facts.where,
            why=f"the longest has {max(facts.lengths):,} tokens",
            hint=f"seq_length: {max(facts.lengths) - 1}, or shorter documents",
            level="error" if longer == looked_at else "warning",
        )


def _vocabulary(data: Indexed, facts: Facts, reader: Reader) -> Iterator[Problem]:
    config = reader.json(data.config) if data.config else None
    rows = (config or {}).get("vocab_size")
    if not isinstance(rows, int):
        return
    most = max((max(ids) for ids in facts.first if len(ids)), default=0)
    size = facts.sidecar.get("vocab_size")
    if most >= rows or (isinstance(size, int) and size > rows):
        made = f"its tokenizer has {size:,} pieces" if size else f"it holds the id {most}"
        yield Problem(
            f"the model's vocabulary of {rows:,} is too small for `{facts.prefix}`",
            data.where_config,
            why=f"{made}; an id past the embedding stops the first step, on a GPU without a word",
            hint="name the model that belongs to the data's tokenizer",
        )


def _tokenizer(data: Indexed, seen: Sequence[Facts], reader: Reader) -> Iterator[Problem]:
    made_with = [(facts, facts.sidecar.get("model_sha256")) for facts in seen]
    known = [(facts, digest) for facts, digest in made_with if isinstance(digest, str)]
    for facts, digest in known[1:]:
        if digest != known[0][1]:
            yield Problem(
                f"`{facts.prefix}` was made with another tokenizer than `{known[0][0].prefix}`",
                facts.where,
                hint="tokenize both with the same model",
            )
    size = reader.size(data.tokenizer) if data.tokenizer else None
    if not known or size is None or size > reader.left:
        return
    import hashlib

    try:
        digest = hashlib.sha256(reader.read(data.tokenizer or "", 0, size)).hexdigest()
    except OSError:
        return
    if digest != known[0][1]:
        made_by = known[0][0].sidecar.get("model_path") or "another file"
        yield Problem(
            f"`{os.path.basename(data.tokenizer or '')}` is not the tokenizer that"
            f" `{known[0][0].prefix}` was made with",
            data.where_tokenizer,
            why=f"the data's was {made_by} (sha256 {known[0][1][:12]}…, not {digest[:12]}…)",
            hint="name the tokenizer of the data, or tokenize the data again",
        )


def _epochs(data: Indexed, seen: Sequence[Facts]) -> Iterator[Problem]:
    """How often the run goes through its data, from the lengths that were read."""
    if not data.rows or not data.window:
        return
    epoch = 0.0
    for facts in seen:
        fitting = [length for length in facts.lengths if length <= data.window + 1]
        full = sum(fitting) / (data.window + 1) if data.packed else len(fitting)
        epoch += full * facts.documents / max(len(facts.lengths), 1)
    if epoch < 1e-9:
        return
    epochs = data.rows / max(epoch, 1.0)
    yield Problem(
        f"the run trains on {data.rows:,} rows, about {epochs:,.3g} epochs of its data",
        data.where_rows,
        why=f"an epoch is about {max(epoch, 1.0):,.0f} rows of {data.window} tokens",
        hint=f"about {data.rows / epochs:,.0f} rows are one epoch" if epochs > MOST_EPOCHS else "",
        level="warning" if epochs > MOST_EPOCHS else "note",
    )
