"""Our shortcut around SentencePiece's normalization gives what it gives."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenize_help import dialogues, model_path

from hpctrain.tokenize.encode import processor
from hpctrain.tokenize.normalize import make_normalizer, read_rules
from hpctrain.tokenize.spm import load_model

KINDS = ["bpe_nmt_nfkc", "unigram_identity", "bpe_user_defined"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_alone_and_beside_letters(kind):
    model = load_model(model_path(kind))
    sp = processor(model)
    normalize = make_normalizer(model, sp)
    codes = [
        *range(0x3400),
        *range(0xAC00, 0xD7A4, 97),
        *range(0xF900, 0x10000),
        *range(0x1D400, 0x1D500),
        *range(0x2F800, 0x2FA20),
    ]
    texts = [text for code in codes for text in (f"{chr(code)}e{chr(code)}{chr(code)} b {chr(code)}", chr(code))]

    assert normalize(texts) == sp.normalize(texts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.one_of(st.characters(), st.sampled_from("e \n\t▁́각\u00a0\u2028\x1f\u200b"))), max_size=20))
def test_any_text(texts):
    texts = [text for text in texts if not any("\ud800" <= char <= "\udfff" for char in text)]
    for kind in KINDS:
        model = load_model(model_path(kind))
        sp = processor(model)
        assert make_normalizer(model, sp)(texts) == [sp.normalize(text) for text in texts]


def test_most_text_takes_the_short_way(monkeypatch):
    class Counting:
        seen = 0

        def normalize(self, texts):
            self.seen += len(texts)
            return texts

    counting = Counting()
    texts = [line for text in dialogues(50) for line in text.split("<") if line.isprintable()]
    make_normalizer(load_model(model_path("bpe_nmt_nfkc")), counting)(texts)
    assert counting.seen < len(texts) / 2


def test_the_rules_are_those_of_nmt_nfkc():
    rules = read_rules(load_model(model_path("bpe_nmt_nfkc")).charsmap)
    assert rules["\n"] == " " and rules["\x01"] == "" and rules["ﬁ"] == "fi" and rules["e\u0301"] == "é"
    odd = [text for text in rules if len(text) > 1 and not unicodedata.combining(text[1])]
    assert all("ᄀ" <= text[0] <= "힣" or ord(text[1]) > 0x900 for text in odd)
    assert read_rules(b"") == {}
