"""Control tokens are looked up and checked, never assumed."""

import pytest
from tokenize_help import CONTROL, EOD, A, U, model_path

from hpctrain.base.errors import UsageError
from hpctrain.data.control import resolve
from hpctrain.data.spm import load_model


def load(*control, kind="bpe_identity"):
    return load_model(model_path(kind, control=tuple(control or CONTROL)))


def problems(*args, **kwargs):
    with pytest.raises(UsageError) as caught:
        resolve(*args, **kwargs)
    return [problem.what for problem in caught.value.problems]


def test_the_defaults_are_verified_on_the_model():
    control = resolve(load())

    assert control.ids() == {U: 7, A: 8} and control.eod_id == 9
    assert control.roles() == {"user": 7, "assistant": 8}


def test_other_ids_are_refused_unless_configured():
    model = load("<|user|>", "<|assistant|>", EOD)

    assert problems(model) == [
        "`<|user|>` has id 3 in this model, not 7",
        "`<|assistant|>` has id 4 in this model, not 8",
    ]
    assert resolve(model, [f"{U}=<|user|>", f"{A}=<|assistant|>"]).ids() == {U: 3, A: 4}
    assert problems(model, [f"{U}=<|user|>=9"]) == ["`<|user|>` has id 3 in this model, not 9"]


def test_everything_missing_is_named_at_once():
    found = problems(load("<|user|>"))

    assert found == [
        "`<|user|>` has id 3 in this model, not 7",
        "this model has no piece `<|assistant|>`, the control token of `<<<|assistant|>>>`",
        "this model has no piece `<|endoftext|>`, the end-of-document token",
    ]


def test_eod_is_never_the_unknown_token():
    model = load(*CONTROL[:-1])

    assert problems(model) == ["this model has no piece `<|endoftext|>`, the end-of-document token"]
    assert "not a control symbol" in problems(model, eod_piece="<unk>")[0]
    assert resolve(model, append_eod=False).eod_id is None
    assert resolve(model, eod_piece="</s>").eod_id == 2


def test_pieces_that_text_can_spell_are_refused():
    model = load(kind="bpe_user_defined")
    asked = [f"{U}=<sep>", f"{A}=<|assistant|>"]

    assert "not a control symbol of this model but user_defined" in problems(model, asked)[0]
    assert resolve(model, asked, allow_user_defined=True).forgeable == (
        model.pieces.index("<sep>"),
    )
    assert (
        "but normal" in problems(model, [f"{U}=the"], allow_user_defined=True)[0]
        or "no piece" in problems(model, [f"{U}=the"])[0]
    )
    assert "but byte" in problems(model, [f"{U}=<0x0A>"], allow_user_defined=True)[0]


@pytest.mark.parametrize("text", ["", "x", "=", "a=", "=b", "a=b=c", "a==b"])
def test_malformed_options_are_refused(text):
    assert "is not MARKER=PIECE" in problems(load(), [text])[0]


def test_clashing_markers_are_refused():
    assert "overlap" in problems(load(), ["<a>=<|r3|>", "x<a>=<|r4|>"])[0]
    assert "both stand for id 3" in problems(load(), ["<a>=<|r3|>", "<b>=<|r3|>"])[0]
