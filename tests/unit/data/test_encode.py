"""The fast encoder equals SentencePiece on everything, or is not used; text never becomes a control
token."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenize_help as help
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenize_help import CONTROL, KINDS, model_path

from hpctrain.base.errors import EnvironmentFault
from hpctrain.data.encoders import fast
from hpctrain.data.encoders.encode import choose_encoder
from hpctrain.data.encoders.reference import EncoderDisagrees, processor
from hpctrain.data.spm import CONTROL as CONTROL_TYPE
from hpctrain.data.spm import load_model, parse_model

FAST = [kind for kind in KINDS if kind.startswith("bpe")]
ENCODERS = {}


def encoder(kind):
    if kind not in ENCODERS:
        ENCODERS[kind] = choose_encoder(load_model(model_path(kind)), "auto", help.dialogues(20))
        ENCODERS[kind].model = load_model(model_path(kind))
    return ENCODERS[kind]


def check(one, spans):
    sp = processor(one.model)
    ids, lengths = one.encode(spans)
    want = [sp.encode(span) for span in spans]
    assert lengths.tolist() == list(map(len, want))
    assert ids.tolist() == [number for span in want for number in span]
    assert ids.dtype == np.int32


@pytest.mark.parametrize("kind", FAST)
def test_the_fast_encoder_is_chosen_where_it_is_exact(kind):
    assert encoder(kind).name.startswith("gigatoken"), encoder(kind).notes


def test_models_of_other_types_stay_with_sentencepiece():
    model = load_model(model_path("unigram"))
    assert choose_encoder(model, "auto", []).name.startswith("sentencepiece")
    with pytest.raises(EnvironmentFault, match="cannot be used"):
        choose_encoder(model, "fast", [])


@pytest.mark.parametrize("kind", FAST)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_fast_equals_sentencepiece_on_any_text(kind, data):
    pieces = [piece.replace("▁", " ") for piece in load_model(model_path(kind)).pieces]
    words = st.one_of(
        st.sampled_from(pieces),
        st.text(max_size=8),
        st.sampled_from(pieces).map(lambda piece: piece * 7),
        st.sampled_from([" ", "  ", "\n", "▁", "\u3000", "<0x41>", "<unk>"]),
    )
    spans = data.draw(
        st.lists(st.lists(words, min_size=1, max_size=12).map("".join), min_size=1, max_size=10)
    )

    check(encoder(kind), spans)


@pytest.mark.parametrize("kind", FAST)
def test_fast_equals_sentencepiece_on_other_fuzz_and_dialogues(kind):
    model = load_model(model_path(kind))
    spans = [*fast.fuzz(model, seed=99, count=1500), *help.dialogues(100, seed=5)]

    check(encoder(kind), spans)


@pytest.mark.parametrize("kind", list(KINDS))
def test_text_never_becomes_a_control_token(kind):
    model = load_model(model_path(kind))
    control = set(model.ids_of_type(CONTROL_TYPE))
    glued = [
        "".join(random.Random(n).choices([*CONTROL, "<s>", "</s>", " ", "a"], k=5))
        for n in range(200)
    ]
    spans = [
        *CONTROL,
        "<s>",
        "</s>",
        "<unk>",
        "<0x07>",
        *glued,
        *(f"\U0010ffff{n}\U0010ffff" for n in range(10)),
    ]
    ids, _ = encoder(kind).encode(spans)

    assert control.isdisjoint(ids.tolist())


def test_user_defined_pieces_take_no_detour():
    one = encoder("bpe_user_defined")
    before = one.fallbacks
    check(
        one,
        [
            "a <sep> b",
            "==>x",
            "nothing of it",
            "=<sep",
            "<sep><sep>",
            " <sep>  <sep> ",
            "   ",
            "a\0<sep>",
        ],
    )

    assert one.fallbacks == before + 1  # for the NUL


@pytest.mark.parametrize("kind", FAST)
def test_spans_beside_each_other_do_not_touch(kind):
    one = encoder(kind)
    check(one, ["a", "", "b ", " c", "\u200b", "x\0y", "\0", "▁", "\n", "th", "e ", "e"])
    check(one, ["\u200b", "a"])
    check(one, ["a", "\0"])
    check(one, [""])


def test_an_encoder_that_is_wrong_is_found_out(monkeypatch):
    model = load_model(model_path("bpe_identity"))
    right = fast.tokenizer_json(model)
    monkeypatch.setattr(
        fast,
        "tokenizer_json",
        lambda model: right.replace(b'["a","n"],', b"").replace(b'["t","h"],', b""),
    )
    with pytest.raises(EncoderDisagrees, match="other ids"):
        fast.FastEncoder(model, ["the man than an"])
    chosen = choose_encoder(model, "auto", ["the man than an"])
    assert chosen.name.startswith("sentencepiece") and "other ids" in chosen.notes[0]


def test_spot_checks_go_on_after_the_start(monkeypatch):
    model = load_model(model_path("bpe_identity"))
    one = fast.FastEncoder(model, [])
    one._encode = lambda text: np.array([model.vocab_size, 600] * 10, dtype=np.uint32)
    with pytest.raises(EncoderDisagrees, match="other ids"):
        for _ in range(fast.CHECK_EVERY // 10 + 1):
            one.encode(["some text"] * 10)
    with pytest.raises(EncoderDisagrees, match="border"):
        one.encode(["some text"] * 9)


def test_the_cache_is_dropped_when_it_has_grown(monkeypatch):
    one = fast.FastEncoder(load_model(model_path("bpe_identity")), [])
    before = one._encode
    one.encode(["some text"])
    assert one._encode == before
    one._limit = 0
    one.encode(["some text"])
    assert one._encode != before and one._limit > 0


GROWTH = """
import json, random, sys
from hpctrain.data.encoders import fast, memory
from hpctrain.data.spm import load_model
fast.CACHE_BYTES = 24 << 20
one = fast.FastEncoder(load_model(sys.argv[1]), [])
start, rng, peaks, renewed = memory.resident_bytes(), random.Random(1), [], 0
for _ in range(48):
    spans = [" ".join(f"{rng.getrandbits(40):x}" for _ in range(1000)) for _ in range(50)]
    before = one._encode
    one._encode_all(spans)
    one.encode(["some text"])
    renewed += one._encode != before
    peaks.append(memory.resident_bytes() - start)
print(json.dumps([renewed, peaks]))
"""


def test_a_cache_that_never_forgets_does_not_grow_with_the_input():
    """2.4 million words that never come again, about 230 MiB of cache, with a budget of 24: a table
    doubles, and no more."""
    # a process whose memory nothing else uses
    argv = [sys.executable, "-c", GROWTH, model_path("bpe_identity")]
    renewed, peaks = json.loads(
        subprocess.run(argv, check=True, capture_output=True, timeout=120).stdout
    )

    assert renewed >= 2
    assert max(peaks) < 110 << 20, peaks


def change(data, pieces=(), score=None):
    """The model file with some pieces' types or scores changed, by the protobuf classes that come
    with sentencepiece."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    for index, kind in pieces:
        proto.pieces[index].type = kind
    if score is not None:
        proto.pieces[-400].score = proto.pieces[-401].score
    return proto.SerializeToString()


def test_models_it_does_not_follow_are_refused(monkeypatch):
    model = load_model(model_path("bpe_identity"))
    assert fast.unsuited(model) == ""
    single = next(i for i, piece in enumerate(model.pieces) if piece == "e")
    double = next(
        i
        for i, (piece, kind) in enumerate(zip(model.pieces, model.types))
        if len(piece) == 2 and kind == 1
    )
    for pieces, score, why in [
        (((single, 3),), None, "no piece itself"),
        (((double, 5),), None, "unused"),
    ]:
        assert why in fast.unsuited(parse_model(change(model.data, pieces, score)))


def test_model_files_are_read_as_sentencepiece_reads_them():
    for kind in KINDS:
        model = load_model(model_path(kind))
        sp = processor(model)
        assert model.pieces == tuple(sp.id_to_piece(i) for i in range(sp.vocab_size()))
        assert np.allclose(model.scores, [sp.get_score(i) for i in range(sp.vocab_size())])
        assert [model.types[i] == 3 for i in range(model.vocab_size)] == [
            sp.is_control(i) for i in range(sp.vocab_size())
        ]
        assert model.byte_fallback == any(sp.is_byte(i) for i in range(sp.vocab_size()))
        assert model.add_dummy_prefix == (sp.encode("x y", out_type=str)[0].startswith("▁"))


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"hello", b"\x0a\xff\xff", b"\x0a\x05\x0a\x03abc", b"\xff" * 100]
)
def test_files_that_are_no_model_are_refused(tmp_path, data):
    from hpctrain.base.errors import UsageError

    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="not a SentencePiece model"):
        load_model(str(path))


def test_sentencepiece_encoder_takes_empty_and_many():
    model = load_model(model_path("unigram"))
    one = choose_encoder(model, "sentencepiece", [])
    one.model = model
    ids, lengths = one.encode([])
    assert len(ids) == len(lengths) == 0
    check(one, ["\u200b", "a"] * 600)
