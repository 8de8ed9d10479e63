"""Our shortcut around SentencePiece's normalization gives what it gives."""

import functools
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenize_help import dialogues, model_path

from hpctrain.data.encoders.normalize import careful_characters, make_normalizer
from hpctrain.data.encoders.reference import processor
from hpctrain.data.spm import load_model

KINDS = ["bpe_nmt_nfkc", "unigram_identity", "bpe_user_defined"]


def escaped(joined):
    """What sp.normalize gives: a dummy prefix, escaped spaces."""
    return ["▁" + text.replace(" ", "▁") if text else "" for text in joined.decode().split("\0")]


def custom_charsmap(rules):
    """The rules as the trainer compiles them."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        rows = (
            " ".join(f"{ord(c):X}" for c in a) + "\t" + " ".join(f"{ord(c):X}" for c in b) for a, b in rules.items()
        )
        Path(folder, "rules.tsv").write_text("\n".join(rows) + "\n")
        Path(folder, "text").write_text("some words and letters\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/text", model_prefix=f"{folder}/m", model_type="char", minloglevel=2, vocab_size=20,
            hard_vocab_limit=False, normalization_rule_tsv=f"{folder}/rules.tsv",
        )  # fmt: skip
        return load_model(f"{folder}/m.model").charsmap


@functools.cache
def both(kind):
    sp = processor(load_model(model_path(kind)))
    return make_normalizer(load_model(model_path(kind)), sp), sp


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_alone_and_beside_letters(kind):
    normalize, sp = both(kind)
    codes = [
        *range(1, 0x3400),
        *range(0xAC00, 0xD7A4, 97),
        *range(0xF900, 0x10000),
        *range(0x1D400, 0x1D500),
        *range(0x2F800, 0x2FA20),
    ]
    texts = [text for code in codes for text in (f"{chr(code)}e{chr(code)}{chr(code)} b {chr(code)}", chr(code))]

    assert escaped(normalize(texts)) == sp.normalize(texts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.one_of(st.characters(), st.sampled_from("e \n\t▁́각\u00a0\u2028\x1f\u200b"))), max_size=20))
def test_any_text(texts):
    texts = [re.sub("[\0\ud800-\udfff]", "", text) for text in texts]
    for kind in KINDS:
        normalize, sp = both(kind)
        assert escaped(normalize(texts)) == ([sp.normalize(text) for text in texts] or [""])


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


def test_what_needs_care_is_what_the_rules_of_nmt_nfkc_touch():
    careful = careful_characters(load_model(model_path("bpe_nmt_nfkc")).charsmap)

    assert {ord(char) for char in "\x01ﬁ２\u0301\u200b▁\0"} <= careful
    assert not {ord(char) for char in " \n\tabcàéüāžшЯ狐"} & careful
    # A rule of its own for the space, to `_`, as no usual model has: nothing is short any more.
    assert ord(" ") in careful_characters(custom_charsmap({" ": "_"}))
    assert careful_characters(b"") == set(map(ord, "\n\t\r\u00a0\0▁"))
