"""Pieces of one score, and whether it matters which of them a BPE encoder ranks first.

SentencePiece merges the leftmost of all pairs with the best score; an encoder of ranked merges
takes all places of one piece first, then those of the next. The two differ only where two pieces of
one score compete for a symbol. Real models have such ties: those of the Llama family give all
pieces that are nothing but spaces the score -1e9.

They do not compete when no symbol can be the right part of one and the left part of the other, and
none of them can become part of a piece that is merged no later: then a merge takes no candidate of
another piece away and makes none, so that the order does not matter. Runs of one character do
compete. But where all runs of it have one score and grow into nothing else first, what becomes of
them depends on nothing but their length: whoever allows them compares every length (`tied_runs`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping


def tied_runs(scores: Mapping[str, float]) -> dict[str, int]:
    """The characters whose runs (two and more of it) are several pieces, all of one score: how long
    the longest is.
    """
    runs: dict[str, list[str]] = defaultdict(list)
    for piece in scores:
        if len(piece) > 1 and piece == piece[0] * len(piece):
            runs[piece[0]].append(piece)
    return {
        char: max(map(len, pieces))
        for char, pieces in runs.items()
        if len(pieces) > 1 and len({scores[piece] for piece in pieces}) == 1
    }


def _tied(scores: Mapping[str, float]) -> set[str]:
    """The pieces of two and more characters that share their score."""
    groups: dict[float, list[str]] = defaultdict(list)
    for piece, score in scores.items():
        if len(piece) > 1:
            groups[score].append(piece)
    return {piece for group in groups.values() if len(group) > 1 for piece in group}


def tied_pieces_meet(scores: Mapping[str, float]) -> bool:
    """Whether two pieces of one score may compete for a symbol; `scores` are those of all pieces
    that text can become.
    """
    tied = _tied(scores)
    if not tied:
        return False
    runs = tied_runs(scores)

    def is_run(piece: str) -> bool:
        return piece[0] in runs and not piece.strip(piece[0])

    # By score and symbol: the tied pieces whose left, or right, part the symbol can be.
    lefts: dict[tuple[float, str], set[str]] = defaultdict(set)
    rights: dict[tuple[float, str], set[str]] = defaultdict(set)
    ends = tuple(tied)
    for piece, score in scores.items():
        if piece not in tied and not piece.startswith(ends) and not piece.endswith(ends):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left not in scores or right not in scores:
                continue
            grown = any(part in tied and scores[part] <= score for part in (left, right))
            if grown and not is_run(piece):
                return True
            if piece in tied:
                lefts[score, left].add(piece)
                rights[score, right].add(piece)
    return any(
        one != other and not (is_run(one) and is_run(other))
        for symbol in lefts.keys() & rights.keys()
        for one in lefts[symbol]
        for other in rights[symbol]
    )
