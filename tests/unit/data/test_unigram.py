"""The compiled search equals SentencePiece bit by bit, where scores tie, nearly tie, and where rounding decides."""

import os
import random

import numpy as np
import pytest
from tokenize_help import model_path

from hpctrain.data.encoders import fast
from hpctrain.data.encoders.reference import processor
from hpctrain.data.encoders.unigram import double_array
from hpctrain.data.spm import load_model, parse_model

NUM_MODELS = int(os.environ.get("TOKENIZE_RANDOM_MODELS", "250"))


def scores(rng, count):
    """Scores in which rounding matters: few different ones, differences of a few units in the last place, or any."""
    kind = rng.randrange(5)
    if kind == 0:
        return [-float(rng.randint(1, 3)) for _ in range(count)]
    if kind == 1:
        return [-8.0 - rng.randint(0, 6) * 2.0**-20 for _ in range(count)]
    if kind == 2:
        return [-rng.random() * 20 for _ in range(count)]
    if kind == 3:
        return [rng.choice((-0.1, -0.2, -0.3, -0.7, -1.1)) * rng.choice((1, 3, 10)) for _ in range(count)]
    return [rng.uniform(-3000, 500) for _ in range(count)]


def random_model(rng, charsmap):
    """The bytes of a small model with pieces of any shape: spaces anywhere in them, characters that no piece has alone."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    alphabet = rng.sample("abcdeāßжи漢字😀.=0", rng.randint(2, 7)) + ["▁"]
    texts = {"".join(rng.choices(alphabet, k=rng.choice((1, 1, 2, 2, 3, 4, 6)))) for _ in range(rng.randint(3, 40))}
    texts |= {"".join(rng.choices(alphabet[:2], k=length)) for length in range(1, rng.randint(2, 6))}
    fallback = rng.random() < 0.5
    texts |= {"▁"} if fallback or rng.random() < 0.5 else set()
    rows = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<|user|>", 3)]
    rows += [(f"<0x{byte:02X}>", 6) for byte in range(256)] if fallback else []
    odd = rng.choice((0, 0, 0, 5, 4))  # perhaps some unused or user-defined pieces
    rows += [(text, odd if odd and text != "▁" and rng.random() < 0.1 else 1) for text in sorted(texts)]
    if all(kind != 1 for _, kind in rows):
        rows.append(("z", 1))
    rng.shuffle(rows)
    for (text, kind), score in zip(rows, scores(rng, len(rows))):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    proto.trainer_spec.model_type = 1
    proto.trainer_spec.byte_fallback = fallback
    if charsmap and rng.random() < 0.4:
        proto.normalizer_spec.precompiled_charsmap = charsmap
    proto.normalizer_spec.add_dummy_prefix = rng.random() < 0.7
    proto.normalizer_spec.remove_extra_whitespaces = rng.random() < 0.5
    return proto.SerializeToString(), alphabet


def random_spans(rng, alphabet, count):
    letters = [*alphabet[:-1], " ", *rng.sample([" ", "▁", "  ", "\n", "x", "é", "界", "<s>", "\u200b", "ﬁ"], 3)]
    for _ in range(count):
        few = rng.sample(letters, rng.randint(1, len(letters)))
        yield "".join(rng.choices(few, k=rng.choice((1, 2, 3, 8, 30, 200, 1000))))


@pytest.mark.parametrize("seed", range(10))
def test_random_models_give_the_ids_of_sentencepiece(seed, monkeypatch):
    """250 models x 40 spans; TOKENIZE_RANDOM_MODELS asks for more."""
    monkeypatch.setattr(fast, "fuzz", lambda model, seed: [])
    charsmap = load_model(model_path("unigram")).charsmap
    for number in range(NUM_MODELS // 10):
        rng = random.Random(seed * 1_000_003 + number)
        data, alphabet = random_model(rng, charsmap)
        model = parse_model(data)
        spans = list(random_spans(rng, alphabet, 40))
        assert fast.unsuited(model) == ""
        ids, lengths = fast.FastEncoder(model, []).encode(spans)
        for span, found in zip(spans, np.split(ids, np.cumsum(lengths)[:-1])):
            assert found.tolist() == processor(model).encode(span), (seed, number, span)


def test_rounding_that_depends_on_what_came_before_is_followed():
    """`ab` + `c` and `a` + `bc` differ by less than float32 shows after many words: a cache of words would be wrong."""
    from sentencepiece import sentencepiece_model_pb2

    rng = random.Random(5)
    proto = sentencepiece_model_pb2.ModelProto()
    rows = [
        ("<unk>", 2, 0.0),
        ("▁", 1, -2.1),
        ("ab", 1, -3.3),
        ("c", 1, -4.7),
        ("a", 1, -3.9),
        ("bc", 1, -4.1),
        ("x", 1, -1.7),
    ]
    for text, kind, score in rows:
        piece = proto.pieces.add()
        piece.piece, piece.type, piece.score = text, kind, score
    proto.trainer_spec.model_type = 1
    model = parse_model(proto.SerializeToString())
    one = fast.FastEncoder(model, [])
    spans = [" ".join("x" * rng.randint(0, 3) + "abc" for _ in range(rng.randint(1, 400))) for _ in range(20)]
    ids, lengths = one.encode(spans)
    parts = np.split(ids, np.cumsum(lengths)[:-1])

    assert [part.tolist() for part in parts] == [processor(model).encode(span) for span in spans]
    assert {2, 4} <= set(ids.tolist()), "both ways occur"


def test_texts_whose_scores_grow_too_large_go_to_sentencepiece():
    model = load_model(model_path("unigram_identity"))
    one = fast.FastEncoder(model, [])
    spans = ["a", "the lazy dog " * 4000, "\u1234" * 9000, "b"]
    ids, lengths = one.encode(spans)

    assert one.fallbacks >= 1
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert [part.tolist() for part in parts] == [processor(model).encode(span) for span in spans]


def test_the_trie_holds_the_pieces_and_nothing_else():
    rng = random.Random(2)
    pieces = sorted({bytes(rng.choices(range(1, 256), k=rng.randint(1, 5))) for _ in range(3000)})
    base, check, piece_at = double_array(pieces, list(range(len(pieces))))

    def find(text):
        node = 0
        for byte in text:
            child = base[node] + byte
            if check[child] != node:
                return -1
            node = child
        return piece_at[node]

    assert [find(piece) for piece in pieces] == list(range(len(pieces)))
    others = {bytes(rng.choices(range(256), k=rng.randint(1, 6))) for _ in range(3000)} - set(pieces)
    assert {find(other) for other in others} == {-1}
