"""BPE models of any shape: pieces across spaces, spaces at the end, user-defined pieces inside each other, names as odd as may be."""

import os
import random
import re

import numpy as np
import pytest

from hpctrain.data.encoders import bpe, fast
from hpctrain.data.encoders.encode import choose_encoder
from hpctrain.data.encoders.reference import processor
from hpctrain.data.spm import parse_model

NUM_MODELS = int(os.environ.get("TOKENIZE_RANDOM_MODELS", "80"))


def random_model(rng, charsmap=b""):
    """(bytes of a small model, its alphabet): pieces in any order of scores, spaces anywhere in them, control pieces like text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    alphabet = [*rng.sample("abcdeāßжи漢字😀.=0", rng.randint(2, 6)), "▁"]
    across = rng.random() < 0.6
    texts = {"".join(rng.choices(alphabet, k=rng.choice((2, 2, 3, 4, 6, 12)))) for _ in range(rng.randint(3, 60))}
    texts |= {"".join(rng.choices(alphabet[:2], k=length)) for length in range(2, rng.randint(3, 6))}
    if not across:
        texts = {text for text in texts if "▁" not in text.lstrip("▁")}
    defined = {text for text in sorted(texts) if rng.random() < 0.1} if rng.random() < 0.6 else set()
    if defined and rng.random() < 0.5:
        defined |= {rng.choice(["\n", "a b", "é", "▁", "  "])}
    texts = texts - defined | set(alphabet) - defined
    fallback = rng.random() < 0.5
    rows = [("<unk>", 2), ("<s>", 3), ("x", 3), ("<|user|>", 3), ("é界", 3)]
    rows += [(f"<0x{byte:02X}>", 6) for byte in range(256)] if fallback else []
    rows += [(text, 1) for text in sorted(texts)] + [(text, 4) for text in sorted(defined)]
    rng.shuffle(rows)
    scores = rng.sample(range(-3000, 3), len(rows))
    for (text, kind), score in zip(rows, scores):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = fallback
    proto.trainer_spec.treat_whitespace_as_suffix = rng.random() < 0.3
    proto.normalizer_spec.precompiled_charsmap = charsmap if rng.random() < 0.4 else b""
    proto.normalizer_spec.add_dummy_prefix = rng.random() < 0.7
    proto.normalizer_spec.remove_extra_whitespaces = rng.random() < 0.5
    return proto.SerializeToString(), alphabet


def random_spans(rng, alphabet, count):
    letters = [*alphabet[:-1], " ", *rng.sample([" ", "▁", "  ", "\n", "x", "é", "界", "<s>", "\u200b", "ﬁ", "a b"], 4)]
    for _ in range(count):
        few = rng.sample(letters, rng.randint(1, len(letters)))
        yield "".join(rng.choices(few, k=rng.choice((1, 2, 3, 8, 30, 200, 1000))))


@pytest.mark.parametrize("seed", range(4))
def test_random_models_give_the_ids_of_sentencepiece(seed, monkeypatch):
    """80 models x 40 spans, twice, the second time from what was kept; TOKENIZE_RANDOM_MODELS asks for more."""
    from tokenize_help import model_path

    from hpctrain.data.spm import load_model

    monkeypatch.setattr(fast, "fuzz", lambda model, seed: [])
    charsmap = load_model(model_path("bpe_nmt_nfkc")).charsmap
    names = set()
    for number in range(NUM_MODELS // 4):
        rng = random.Random(seed * 1_000_003 + number)
        data, alphabet = random_model(rng, charsmap)
        model = parse_model(data)
        if fast.unsuited(model):
            continue
        spans = list(random_spans(rng, alphabet, 40))
        want = [processor(model).encode(span) for span in spans]
        one = fast.FastEncoder(model, [])
        names.add(one.name.split()[0])
        for _ in range(2):
            ids, lengths = one.encode(spans)
            for span, found, right in zip(spans, np.split(ids, np.cumsum(lengths)[:-1]), want):
                assert found.tolist() == right, (seed, number, span)
    assert names == {"compiled", "gigatoken"}


def test_parts_without_an_end_go_to_sentencepiece(monkeypatch):
    monkeypatch.setattr(bpe, "_ROOM", 64)
    rng = random.Random(1)
    while True:
        model = parse_model(random_model(rng)[0])
        kinds = dict(zip(model.pieces, model.types))
        if not fast.unsuited(model) and fast.crosses_spaces(model) and kinds.get("aa") == kinds.get("a") == 1:
            break
    one = fast.FastEncoder(model, [])
    spans = ["a" * 63, "a" * 65 + "b", "b" + "a" * 300, "ab"]
    one.fallbacks = 0
    ids, _ = one.encode(spans)

    assert ids.tolist() == [number for span in spans for number in processor(model).encode(span)]
    assert one.fallbacks == 2


def test_compiling_is_worth_it_for_much_data_only():
    rng = random.Random(2)
    while True:
        model = parse_model(random_model(rng)[0])
        if not fast.unsuited(model) and fast.crosses_spaces(model):
            break
    assert choose_encoder(model, "auto", [], 1 << 20).name.startswith("sentencepiece")
    assert choose_encoder(model, "auto", [], 1 << 30).name.startswith("compiled merges")


def test_the_longest_of_the_words_at_a_place_is_found():
    words = [b"ab", b"abc", b"b", b"  ", b"    ", b"a.c", b"\n"]
    found = re.findall(fast.any_of(words), b"abcab xxb      a.ca\n")

    assert found == [b"abc", b"ab", b"b", b"    ", b"  ", b"a.c", b"\n"]
