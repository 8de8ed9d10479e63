"""BPE models of any shape: ties, spaces at the end, user-defined pieces inside each other, names as
odd as may be."""

import os
import random

import numpy as np
import pytest
from tokenize_help import model_path

from hpctrain.data.encoders import fast
from hpctrain.data.encoders.reference import EncoderDisagrees, processor
from hpctrain.data.encoders.ties import tied_runs
from hpctrain.data.spm import NORMAL, load_model, parse_model

NUM_MODELS = int(os.environ.get("TOKENIZE_RANDOM_MODELS", "80"))


def random_model(rng, charsmap=b""):
    """(bytes of a small model, its alphabet): pieces in any order of scores, spaces anywhere in
    them, control pieces like text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    alphabet = [*rng.sample("abcdeāßжи漢字😀.=0", rng.randint(2, 6)), "▁"]
    across = rng.random() < 0.1
    texts = {
        "".join(rng.choices(alphabet, k=rng.choice((2, 2, 3, 4, 6, 12))))
        for _ in range(rng.randint(3, 60))
    }
    texts |= {
        "".join(rng.choices(alphabet[:2], k=length)) for length in range(2, rng.randint(3, 6))
    }
    if not across:
        texts = {text for text in texts if "▁" not in text.lstrip("▁")}
    defined = (
        {text for text in sorted(texts) if rng.random() < 0.1} if rng.random() < 0.6 else set()
    )
    if defined and rng.random() < 0.5:
        defined |= {rng.choice(["\n", "a b", "é", "▁", "  "])}
    texts = texts - defined | set(alphabet) - defined
    fallback = rng.random() < 0.5
    rows = [("<unk>", 2), ("<s>", 3), ("x", 3), ("<|user|>", 3), ("é界", 3)]
    rows += [(f"<0x{byte:02X}>", 6) for byte in range(256)] if fallback else []
    rows += [(text, 1) for text in sorted(texts)] + [(text, 4) for text in sorted(defined)]
    rng.shuffle(rows)
    # scores, so that no two are the same; else ties are everywhere, or among the runs
    many = rng.random() < 0.4
    scores = (
        rng.sample(range(-3000, 3), len(rows))
        if many
        else rng.choices(range(-2000, 3), k=len(rows))
    )
    if not many and rng.random() < 0.5:
        scores = [
            -1e9 if len(text) > 1 and len(set(text)) == 1 else score
            for (text, _), score in zip(rows, scores)
        ]
    for (text, kind), score in zip(rows, scores):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = fallback
    proto.trainer_spec.treat_whitespace_as_suffix = rng.random() < 0.1
    proto.normalizer_spec.precompiled_charsmap = charsmap if rng.random() < 0.4 else b""
    proto.normalizer_spec.add_dummy_prefix = rng.random() < 0.7
    proto.normalizer_spec.remove_extra_whitespaces = rng.random() < 0.5
    return proto.SerializeToString(), alphabet


def random_spans(rng, alphabet, count):
    letters = [
        *alphabet[:-1],
        " ",
        *rng.sample([" ", "▁", "  ", "\n", "x", "é", "界", "<s>", "\u200b", "ﬁ", "a b"], 4),
    ]
    for _ in range(count):
        few = rng.sample(letters, rng.randint(1, len(letters)))
        yield "".join(rng.choices(few, k=rng.choice((1, 2, 3, 8, 30, 200, 1000))))


@pytest.mark.parametrize("seed", range(4))
def test_random_models_give_the_ids_of_sentencepiece(seed):
    """80 models x 40 spans, twice, the second time from what was kept; TOKENIZE_RANDOM_MODELS asks
    for more."""
    charsmap = load_model(model_path("bpe_nmt_nfkc")).charsmap
    compared = 0
    for number in range(NUM_MODELS // 4):
        rng = random.Random(seed * 1_000_003 + number)
        data, alphabet = random_model(rng, charsmap)
        model = parse_model(data)
        if fast.unsuited(model):
            continue
        scores = {model.pieces[index]: model.scores[index] for index in model.ids_of_type(NORMAL)}
        try:
            one = fast.FastEncoder(model, [])
        except EncoderDisagrees:
            # the one structure that only the self-check tells apart
            assert tied_runs(scores), (seed, number)
            continue
        spans = list(random_spans(rng, alphabet, 40))
        want = [processor(model).encode(span) for span in spans]
        compared += 1
        for _ in range(2):
            ids, lengths = one.encode(spans)
            for span, found, right in zip(spans, np.split(ids, np.cumsum(lengths)[:-1]), want):
                assert found.tolist() == right, (seed, number, span)
    assert compared > NUM_MODELS // 10
