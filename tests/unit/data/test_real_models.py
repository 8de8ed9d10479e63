"""Tokenizers that people train with, out of a package of the index, take the fast encoder and give
SentencePiece's ids.

TOKENIZE_FUZZ_SPANS asks for more than 4,000 spans a model, for example before a release of
gigatoken is allowed:

    pip install --upgrade gigatoken; TOKENIZE_FUZZ_SPANS=100000 python -m pytest
    tests/unit/data/test_real_models.py
"""

import importlib.metadata
import os

import pytest
from needed import ALL_IS_HERE
from tokenize_help import dialogues

from hpctrain.data.encoders import fast
from hpctrain.data.encoders.encode import choose_encoder
from hpctrain.data.encoders.reference import processor
from hpctrain.data.spm import load_model

NUM_SPANS = int(os.environ.get("TOKENIZE_FUZZ_SPANS", "4000"))
BLOCK = 2000


def shipped_models():
    """The SentencePiece models of Mistral v1, v2, v3 and v7, of the Llama family: {name: path}."""
    try:
        files = importlib.metadata.files("mistral-common") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {file.name: str(file.locate()) for file in files if ".model" in file.name}


MODELS = shipped_models()
needs_models = pytest.mark.skipif(
    not MODELS and not ALL_IS_HERE, reason="pip install --no-deps mistral-common"
)


def test_the_models_are_here_where_everything_is():
    assert MODELS or not ALL_IS_HERE


def hostile_spans(model):
    """Fuzz of the model's own pieces, dialogues, and runs of spaces before words."""
    yield from (" " * count + word for count in range(1, 101) for word in ("", "x", "word", "\n"))
    yield from dialogues(200, seed=7)
    yield from fast.fuzz(model, seed=2026, count=NUM_SPANS)


@needs_models
@pytest.mark.parametrize("name", sorted(MODELS) or ["none"])
def test_a_real_model_is_fast_and_exact(name):
    model = load_model(MODELS[name])
    sp = processor(model)
    chosen = choose_encoder(model, "auto", [])
    assert chosen.name.startswith("gigatoken"), chosen.notes
    spans = list(hostile_spans(model))
    assert len(spans) > NUM_SPANS
    for begin in range(0, len(spans), BLOCK):
        block = spans[begin : begin + BLOCK]
        ids, lengths = chosen.encode(block)
        right = [sp.encode(span) for span in block]
        assert lengths.tolist() == list(map(len, right))
        assert ids.tolist() == [number for span in right for number in span]
    assert chosen.fallbacks < len(spans) / 10


@needs_models
def test_there_are_the_four_generations():
    assert len(MODELS) >= 4
