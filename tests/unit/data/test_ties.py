"""Ties of scores are harmless where `tied_pieces_meet` says so: tried on every text of a small
alphabet.
"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.encoders.ties import tied_pieces_meet, tied_runs

LENGTH = 7  # of the longest text that is tried


def merged(text, order):
    """The symbols of `text` when the adjacent pair with the least `order(piece, position)` is
    merged until none is left.
    """
    symbols = list(text)
    while True:
        pairs = [
            (order(a + b, at), at)
            for at, (a, b) in enumerate(zip(symbols, symbols[1:]))
            if order(a + b, at)
        ]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def sentencepiece(scores):
    """Best score first, leftmost first (bpe_model.cc)."""
    return lambda piece, at: (-scores[piece], at) if piece in scores else None


def ranked(scores, ranks):
    """Best rank first, leftmost first; ranks refine the scores."""
    return lambda piece, at: (-scores[piece], ranks[piece], at) if piece in scores else None


def differs(scores, ranks, texts):
    one, other = sentencepiece(scores), ranked(scores, ranks)
    return next((text for text in texts if merged(text, one) != merged(text, other)), None)


def texts_of(alphabet):
    return [
        "".join(word)
        for size in range(2, LENGTH + 1)
        for word in itertools.product(alphabet, repeat=size)
    ]


ALL = texts_of("ab")
PIECES = st.text("ab", min_size=2, max_size=4)
MODELS = st.dictionaries(PIECES, st.sampled_from([-1.0, -2.0, -3.0]), min_size=2, max_size=7)


@settings(max_examples=300, deadline=None)
@given(MODELS, st.randoms(use_true_random=False))
def test_no_text_tells_ties_apart_that_do_not_meet(model, rng):
    scores = {"a": 0.0, "b": 0.0, **model}
    pieces = list(scores)
    ranks = dict(zip(rng.sample(pieces, len(pieces)), range(len(pieces))))
    runs = [
        char * size
        for char, longest in tied_runs(scores).items()
        for size in range(2, 3 * longest + 2)
    ]

    if not tied_pieces_meet(scores) and differs(scores, ranks, runs) is None:
        assert differs(scores, ranks, ALL) is None


@pytest.mark.parametrize(
    "tied, more",
    [
        (["ab", "ba"], []),  # share a symbol: aba
        (["aa", "ab"], []),  # aab
        (["ab", "cd"], ["abc"]),  # one grows at once, into what the other needs: abcd
    ],
)
def test_pieces_that_compete_meet(tied, more):
    scores = {
        **dict.fromkeys("abcd", 0.0),
        **dict.fromkeys(tied, -2.0),
        **dict.fromkeys(more, -1.0),
    }
    backwards = {piece: number for number, piece in enumerate(reversed([*tied, *more, *"abcd"]))}

    assert tied_pieces_meet(scores)
    assert differs(scores, backwards, texts_of("abcd")) is not None


def test_a_piece_that_grows_into_one_of_its_own_score_meets_it():
    # In abcd·ab·cdab the leftmost merge is abcd, then abcdab; a better rank of abcdab takes the ab
    # away.
    parts = {**dict.fromkeys("abcd", 0.0), "ab": -1.0, "bcd": -2.0, "cdab": -3.0}

    assert tied_pieces_meet({**parts, "abcd": -9.0, "abcdab": -9.0})
    assert not tied_pieces_meet({**parts, "abcd": -9.0, "abcdab": -9.5})


def test_pieces_that_cannot_compete_do_not_meet():
    assert not tied_pieces_meet({**dict.fromkeys("abcd", 0.0), "ab": -1.0, "cd": -1.0, "abc": -2.0})
    assert not tied_pieces_meet({**dict.fromkeys("abcd", 0.0), "ab": -1.0, "cd": -2.0})


def test_runs_of_one_character_are_left_to_a_comparison_of_every_length():
    runs = {"▁" * size: -1e9 for size in (2, 3, 4, 8)}
    scores = {**dict.fromkeys("▁ab", 0.0), "▁a": -1.0, **runs}

    assert tied_runs(scores) == {"▁": 8} and not tied_pieces_meet(scores)
    assert tied_pieces_meet({**scores, "▁b": -1e9})  # a word that competes with them
    assert tied_pieces_meet({**scores, "▁▁a": -1.0})  # one that they grow into
    assert (
        tied_pieces_meet({**scores, "▁▁": -5.0}) is True and tied_runs({**scores, "▁▁": -5.0}) == {}
    )
