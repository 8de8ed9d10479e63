"""A SentencePiece model as a `tokenizers` tokenizer with the same ids, control tokens and chat
template.

The difference that remains, on purpose: the Hugging Face tokenizer takes a control token that is
written out in a text for the control token, as chat templates need; SentencePiece, and so the
training data, never do.
"""

from __future__ import annotations

import os
from typing import Any

from hpctrain.base.errors import UsageError, need
from hpctrain.data.spm import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, SpmModel
from hpctrain.train.core.source import Chat

_SPACE = "▁"


def convert(model: SpmModel) -> Any:
    """A `tokenizers.Tokenizer` that encodes as SentencePiece does.

    Raises UsageError for what `tokenizers` cannot express (word and char models, whitespace as
    suffix), EnvironmentFault when the package is missing.
    """
    tokenizers = need("tokenizers", "train")
    if model.model_type not in ("bpe", "unigram") or model.suffix_whitespace:
        what = (
            "treats whitespace as a suffix"
            if model.suffix_whitespace
            else f"is a {model.model_type} model"
        )
        raise UsageError(
            f"the tokenizer {what}, which Hugging Face tokenizers cannot express", where=model.path
        )
    unknown = model.ids_of_type(UNKNOWN)[0]
    if model.model_type == "unigram":
        scores = [(piece, _score(model, index)) for index, piece in enumerate(model.pieces)]
        engine: Any = tokenizers.models.Unigram(scores, unknown, model.byte_fallback)
    else:
        engine = tokenizers.models.BPE(
            vocab={piece: index for index, piece in enumerate(model.pieces)},
            merges=_merges(model),
            unk_token=model.pieces[unknown],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    out = tokenizers.Tokenizer(engine)
    out.normalizer = tokenizers.normalizers.Sequence(_normalizers(model, tokenizers))
    decoders = [
        tokenizers.decoders.Replace(_SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if model.add_dummy_prefix:
        decoders.append(tokenizers.decoders.Strip(" ", 1, 0))
    out.decoder = tokenizers.decoders.Sequence(decoders)
    special = [
        tokenizers.AddedToken(
            model.pieces[index], special=model.types[index] != USER_DEFINED, normalized=False
        )
        for index in model.ids_of_type(CONTROL, UNKNOWN, USER_DEFINED)
    ]
    out.add_special_tokens([token for token in special if token.special])
    out.add_tokens([token for token in special if not token.special])
    return out


def save_tokenizer(model: SpmModel, chat: Chat, directory: str, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json with the chat template, and the model itself into
    `directory`."""
    transformers = need("transformers", "train")

    def piece(index: int | None) -> str | None:
        return None if index is None else model.pieces[index]

    eod = piece(end_of_document(model, chat))
    named = {
        "unk_token": model.pieces[model.ids_of_type(UNKNOWN)[0]],
        "eos_token": eod,
        "pad_token": eod,
    }
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=convert(model),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{name: value for name, value in named.items() if value is not None},
    )
    template = chat_template(
        piece(chat.user_open), piece(chat.user_close), piece(chat.assistant), eod
    )
    if template:
        fast.chat_template = template
    fast.save_pretrained(directory)
    with open(os.path.join(directory, "tokenizer.model"), "wb") as file:
        file.write(model.data)


def end_of_document(model: SpmModel, chat: Chat) -> int | None:
    """The id that ends a document: the run's, else that of `<|endoftext|>` or `</s>` when it is a
    control symbol."""
    if chat.eod is not None:
        return chat.eod
    control = {model.pieces[index]: index for index in model.ids_of_type(CONTROL)}
    return control.get("<|endoftext|>", control.get("</s>"))


def chat_template(
    user_open: str | None, user_close: str | None, assistant: str | None, eod: str | None
) -> str:
    """Jinja that writes a dialogue as the training data has it; empty when the run trained no
    dialogues."""
    if user_open is None or user_close is None or assistant is None:
        return ""
    quoted = {
        name: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
        for name, text in (("o", user_open), ("c", user_close), ("a", assistant), ("e", eod or ""))
    }
    return (
        f"{{% for message in messages %}}{{% if message['role'] == 'user' %}}{{{{ {quoted['o']} +"
        f" message['content'] + {quoted['c']} }}}}{{% elif message['role'] == 'assistant' %}}{{{{"
        f" {quoted['a']} + message['content'] + {quoted['a']} }}}}{{% else %}}{{{{"
        " raise_exception('this model knows the roles user and assistant') }}{% endif %}{%"
        f" endfor %}}{{% if add_generation_prompt %}}{{{{ {quoted['a']} }}}}{{% else %}}{{{{"
        f" {quoted['e']} }}}}{{% endif %}}"
    )


def _score(model: SpmModel, index: int) -> float:
    # Pieces that SentencePiece never chooses must not be chosen here: unused, control and byte
    # pieces.
    return -1e9 if model.types[index] in (UNUSED, CONTROL, BYTE) else model.scores[index]


def _merges(model: SpmModel) -> list[tuple[str, str]]:
    """Every way to join two pieces into one, best score first: SentencePiece joins the pair whose
    result scores highest."""
    usable = {
        model.pieces[index]: model.scores[index]
        for index, kind in enumerate(model.types)
        if kind not in (UNKNOWN, CONTROL, BYTE, USER_DEFINED)
    }
    found = []
    for order, (piece, score) in enumerate(usable.items()):
        for cut in range(1, len(piece)):
            if piece[:cut] in usable and piece[cut:] in usable:
                found.append((-score, order, cut, piece))
    return [(piece[:cut], piece[cut:]) for _, _, cut, piece in sorted(found)]


def _normalizers(model: SpmModel, tokenizers: Any) -> list[Any]:
    normalizers = tokenizers.normalizers
    out = []
    if model.charsmap:
        out.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        out += [normalizers.Strip(True, True), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        out.append(normalizers.Prepend(_SPACE if model.escape_whitespaces else " "))
    if model.escape_whitespaces:
        out.append(normalizers.Replace(" ", _SPACE))
    return out
