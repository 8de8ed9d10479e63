"""Which tokens of a packed row are trained: the `loss_mask_*` rules of the GPT-NeoX fork, as pure
functions of token ids.

A mask belongs to the token being *generated*: a row of `seq_length + 1` tokens gives `row[1:]`
labels, and label `i` is trained when `trained_tokens(row, …)[i + 1]` is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskRules:
    """The masking keys of a config, as token ids. `pairs` are (open, close); no rule at all trains
    every token."""

    pairs: tuple[tuple[int, int], ...] = ()
    alternating: tuple[int, ...] = ()
    individual: tuple[int, ...] = ()
    after_eod: int | None = None  # the EOD id when `eod_mask_loss` is set


@dataclass(frozen=True)
class Unclosed:
    """A pair or alternating token that occurs an uneven number of times in one document."""

    document: int  # index within the row
    rule: str  # for example `loss_mask_pairs [7, 7]`


def rules_from_config(
    loss_mask_pairs: Sequence[int] = (),
    loss_mask_alternating_individual: Sequence[int] = (),
    loss_mask_individual: Sequence[int] = (),
    eod_mask_loss: bool = False,
    eod_id: int | None = None,
) -> MaskRules:
    """The rules as the config writes them: `loss_mask_pairs` is flat, `[open, close, open, close,
    …]`.

    Raises ValueError when `loss_mask_pairs` has an odd length, or `eod_mask_loss` is set without an
    `eod_id`.
    """
    if len(loss_mask_pairs) % 2:
        raise ValueError(
            f"`loss_mask_pairs` has {len(loss_mask_pairs)} ids; it is a flat list of open, close, …"
        )
    if eod_mask_loss and eod_id is None:
        raise ValueError("`eod_mask_loss` needs to know the id of the end-of-document token")
    pairs = tuple((int(a), int(b)) for a, b in zip(loss_mask_pairs[::2], loss_mask_pairs[1::2]))
    return MaskRules(
        pairs=pairs,
        alternating=tuple(map(int, loss_mask_alternating_individual)),
        individual=tuple(map(int, loss_mask_individual)),
        after_eod=eod_id if eod_mask_loss else None,
    )


def trained_tokens(
    row: npt.NDArray[Any], rules: MaskRules, starts: Sequence[int] | npt.NDArray[Any] | None = None
) -> Bools:
    """True for every token of `row` that is trained when it is the one generated; same length as
    `row`.

    - pair (a, b): everything from a to b is untrained, both included. Equal ids alternate by
      parity, different ids compare how many were opened and closed so far; nesting is not defined.
    - alternating: the 1st, 3rd, … occurrence is untrained (the opening one), the 2nd, 4th, … is
      trained.
    - individual: untrained wherever it occurs. after_eod: the token after each EOD is untrained.

    Counting runs over the whole row, as in the fork, or from 0 in each document when `starts` gives
    the index where each document begins; the two agree when every document closes what it opens,
    and with `starts` one bad document cannot flip those behind it.
    """
    row = np.asarray(row)
    masked = np.zeros(row.shape, dtype=bool)
    first_of = _document_starts(len(row), starts)
    for opening, closing in rules.pairs:
        opened = _count(row == opening, first_of)
        if opening == closing:
            # Odd counts are inside; an even count on the token itself is the closing one, which is
            # included.
            masked |= (opened % 2 == 1) | (row == closing)
        else:
            is_close = row == closing
            closed_before = _count(is_close, first_of) - is_close
            masked |= opened > closed_before
    for token in rules.alternating:
        here = row == token
        masked |= here & (_count(here, first_of) % 2 == 1)
    if rules.individual:
        masked |= np.isin(row, np.asarray(rules.individual))
    if rules.after_eod is not None:
        masked[1:] |= row[:-1] == rules.after_eod
    return ~masked


def find_unclosed(
    row: npt.NDArray[Any], rules: MaskRules, starts: Sequence[int] | npt.NDArray[Any] | None = None
) -> list[Unclosed]:
    """Every document of `row` that leaves a pair or an alternating token open; what the fork only
    warns about."""
    row = np.asarray(row)
    bounds = [0] if starts is None else [int(start) for start in starts]
    found = []
    for document, (begin, end) in enumerate(zip(bounds, [*bounds[1:], len(row)])):
        tokens = row[begin:end]
        for opening, closing in rules.pairs:
            odd = np.count_nonzero(tokens == opening) % 2 == 1
            uneven = np.count_nonzero(tokens == opening) != np.count_nonzero(tokens == closing)
            if odd if opening == closing else uneven:
                found.append(Unclosed(document, f"loss_mask_pairs [{opening}, {closing}]"))
        for token in rules.alternating:
            if np.count_nonzero(tokens == token) % 2:
                found.append(Unclosed(document, f"loss_mask_alternating_individual [{token}]"))
    return found


def _document_starts(
    length: int, starts: Sequence[int] | npt.NDArray[Any] | None
) -> npt.NDArray[np.int64]:
    """For every position, the index where its document begins."""
    first_of = np.zeros(length, dtype=np.int64)
    if starts is not None:
        inner = np.asarray(starts, dtype=np.int64)
        inner = inner[(inner > 0) & (inner < length)]
        first_of[inner] = inner
        np.maximum.accumulate(first_of, out=first_of)
    return first_of


def _count(here: Bools, first_of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often `here` was true so far, this position included, counted within the document."""
    total = np.cumsum(here, dtype=np.int64)
    if not len(total):
        return total
    before = np.where(first_of > 0, total[first_of - 1], 0)
    return total - before
