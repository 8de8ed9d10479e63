"""Answers from a run's weights, with the control tokens where training had them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.data.spm import load_model
from hpctrain.train.core.hf_tokenizer import end_of_document
from hpctrain.train.core.source import Chat, Source
from hpctrain.train.sft.export import load_hf_model


@dataclass(frozen=True)
class Answer:
    """One reply. `stopped_by` is assistant (the reply was closed), eod or length."""

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    stopped_by: str


def prompt_ids(encoded: Sequence[int], chat: Chat) -> list[int]:
    """`user_open … user_close assistant`, ready for a reply; the bare text when the run trained no
    dialogues."""
    if chat.user_open is None or chat.user_close is None or chat.assistant is None:
        return list(encoded)
    return [chat.user_open, *encoded, chat.user_close, chat.assistant]


def answer(
    source: Source,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: str | None = None,
) -> list[Answer]:
    """One reply for each prompt, each a dialogue of its own; greedy at temperature 0, else sampled
    from `seed`.

    A prompt is encoded by SentencePiece as a span of the training data is, so text that spells a
    control token stays text. Raises UsageError when a prompt has no tokens or does not fit,
    EnvironmentFault when there is no tokenizer.
    """
    path = tokenizer or source.tokenizer
    if path is None:
        raise EnvironmentFault(
            f"`{source.path}` holds no tokenizer.model",
            hint=(
                "name the SentencePiece model with --tokenizer, or set `tokenizer:` in the run's"
                " config"
            ),
        )
    import sentencepiece

    model_file = load_model(path)
    encoder = sentencepiece.SentencePieceProcessor(model_proto=model_file.data)
    model = load_hf_model(source)
    import torch

    room = int(model.config.max_position_embeddings)
    eod = end_of_document(model_file, source.chat)
    # A model may have more embeddings than the tokenizer has pieces; no text stands for those.
    nameless = list(range(model_file.vocab_size, int(model.config.vocab_size))) or None
    stops = {
        token: name
        for token, name in ((eod, "eod"), (source.chat.assistant, "assistant"))
        if token is not None
    }
    out = []
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {prompt[:40]!a} is not UTF-8") from None
        start = prompt_ids(encoder.encode(prompt), source.chat)
        if not prompt.strip() or len(start) >= room:
            what = (
                "is empty"
                if not prompt.strip()
                else f"has {len(start)} tokens, and the model sees {room}"
            )
            raise UsageError(f"the prompt `{prompt[:40]}` {what}")
        torch.manual_seed(seed)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p}
            if temperature > 0
            else {"do_sample": False}
        )
        ids = torch.tensor([start])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(max_tokens, room - len(start)),
                eos_token_id=sorted(stops) or None,
                pad_token_id=0,
                suppress_tokens=nameless,
                **sampling,
            )
        reply = whole[0, len(start) :].tolist()
        stopped_by = stops.get(reply[-1], "length") if reply else "length"
        kept = reply[:-1] if stopped_by != "length" else reply
        out.append(Answer(prompt, encoder.decode(kept), tuple(start), tuple(reply), stopped_by))
    return out
