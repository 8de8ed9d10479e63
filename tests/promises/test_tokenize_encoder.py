"""However gigatoken fails, at import, at start or in the middle, the dataset is the reference's and
a note says why.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gigatoken
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenize_help import dialogues, model_path, oracle, write_jsonl  # noqa: E402
from tokenize_runs import cli, do, pair, request  # noqa: E402

from hpctrain.base.errors import EnvironmentFault  # noqa: E402
from hpctrain.data import worker  # noqa: E402
from hpctrain.data.encoders.encode import choose_encoder  # noqa: E402
from hpctrain.data.spm import load_model  # noqa: E402

# What `import gigatoken` finds: a release that lost a name, one that cannot be loaded, one that
# fails later on.
STUBS = {
    "cannot be loaded": "raise ImportError('libfoo.so.1: undefined symbol')",
    "breaks on import": "raise RuntimeError('needs a newer Python')",
    "lost its class": "",
    "lost its loader": "class Tokenizer: pass",
    "refuses the model": (
        "class Tokenizer:\n  def from_json(data): raise ValueError('unknown field')"
    ),
    "panics": (
        "class Panic(BaseException): pass\nclass Tokenizer:\n  def from_json(data): raise"
        " Panic('index out of bounds')"
    ),
    "gives lists": (
        "class Tokenizer:\n  def from_json(data): return Tokenizer()\n  def encode(self, text):"
        " return [1, 2]"
    ),
    "gives nothing": (
        "class Tokenizer:\n  def from_json(data): return Tokenizer()\n  def encode(self, text):"
        " pass"
    ),
    "gives ids past the end": (
        "import numpy\nclass Tokenizer:\n  def from_json(data): return Tokenizer()\n"
        "  def encode(self, text): return numpy.full(text.count(b'\\0'), 10**9, dtype=numpy.uint32)"
    ),
}


@pytest.mark.parametrize("stub", list(STUBS))
def test_a_gigatoken_that_fails_at_the_start_is_a_note(tmp_path, monkeypatch, stub):
    (tmp_path / "gigatoken.py").write_text(STUBS[stub])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gigatoken")
    model = load_model(model_path("bpe_identity"))
    chosen = choose_encoder(model, "auto", [])

    assert chosen.name.startswith("sentencepiece")
    assert chosen.notes[0].startswith("not the fast encoder: ")
    with pytest.raises(EnvironmentFault, match="cannot be used for this model"):
        choose_encoder(model, "fast", [])


def test_a_command_says_why_it_is_slow_and_writes_the_same(tmp_path):
    (tmp_path / "gigatoken.py").write_text(STUBS["lost its loader"])
    texts = dialogues(30)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    argv = [data, "--tokenizer", model_path("bpe_identity"), "--local", "--tasks", "2"]
    where = {"PYTHONPATH": str(tmp_path)}
    done = cli(*argv, "--output-prefix", tmp_path / "out", env=where)

    assert (
        done.returncode == 0
        and "not the fast encoder: gigatoken failed" in done.stdout + done.stderr
    )
    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    asked = cli(*argv, "--output-prefix", tmp_path / "asked", "--encoder", "fast", env=where)
    assert asked.returncode == 3 and "Traceback" not in asked.stderr


REAL = gigatoken.Tokenizer


class Failing:
    """gigatoken, until the `good` first calls are done."""

    def __init__(self, error, good):
        self.error, self.good = error, good
        self.started = 0

    def from_json(self, data):
        self.started += 1
        return Engine(self, REAL.from_json(data))


class Engine:
    def __init__(self, owner, whole):
        self.owner, self.whole = owner, whole

    def encode(self, text):
        if self.owner.good == 0:
            raise self.owner.error
        self.owner.good -= 1
        return self.whole.encode(text)


class Panic(BaseException):
    """What pyo3 makes of a panic in Rust: no Exception."""


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), MemoryError(), Panic("index out of bounds")]
)
def test_a_failure_in_the_middle_leaves_the_rest_to_the_reference(tmp_path, monkeypatch, error):
    failing = Failing(error, good=2)  # the self-check, and a block
    monkeypatch.setattr(sys.modules["gigatoken"], "Tokenizer", failing)
    monkeypatch.setattr(worker, "_encoders", {})
    texts = dialogues(60)
    inputs = [
        write_jsonl(tmp_path / f"{part}.jsonl", texts[part : part + 20]) for part in (0, 20, 40)
    ]
    manifest = do(request(tmp_path, *inputs, tasks=2))

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    (note,) = [note for note in manifest["encoder_notes"] if "dropped" in note]
    assert type(error).__name__ in note and failing.started == 1
    assert all(name.startswith("sentencepiece") for name in manifest["encoders"])


def test_an_interrupt_is_no_failure_of_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["gigatoken"], "Tokenizer", Failing(KeyboardInterrupt(), good=1))
    monkeypatch.setattr(worker, "_encoders", {})
    with pytest.raises(KeyboardInterrupt):
        do(request(tmp_path, write_jsonl(tmp_path / "a.jsonl", dialogues(20))))
