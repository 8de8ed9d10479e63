"""Rows of a data file to tokens and labels, in the shapes and with the answers of TRL's SFTTrainer.

Understood are `messages` (or `conversations` with from/value), `prompt` and `completion` as text or
as messages, `text`, and tokenized rows: `input_ids` with `labels`, `completion_mask` or
`assistant_masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.train.dpo.records import common_prefix

IGNORED = -100
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
SHAPES = "`messages`, `prompt` and `completion`, `text`, or `input_ids`"
Tokens = tuple[list[int], list[int]]


class Encoder:
    """Encodes rows with one tokenizer. `template`: the chat template that marks the assistant's
    turns, where needed."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        completion_only: bool | None,
        assistant_only: bool,
        template: str | None,
    ):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.completion_only = completion_only is not False
        self.assistant_only, self.template = assistant_only, template

    def encode(self, row: Any) -> Tokens | None:
        """(input_ids, labels) of at most `max_length` tokens; None where no token is left to train
        on.

        Raises ValueError with what is wrong with the row.
        """
        if not isinstance(row, dict):
            raise ValueError("is not an object with columns")
        if row.get("input_ids") is not None:
            ids, labels = _tokenized(row, self.completion_only)
        elif row.get("messages") is not None or row.get("conversations") is not None:
            ids, labels = self._messages(
                _messages(row.get("messages") or row.get("conversations"), "messages")
            )
        elif row.get("prompt") is not None or row.get("completion") is not None:
            ids, labels = self._completion(row.get("prompt"), row.get("completion"))
        elif row.get("text") is not None:
            ids, labels = self._text(row["text"])
        else:
            raise ValueError(f"has none of the columns {SHAPES}")
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        # The first label is never predicted, so it alone trains nothing.
        return (ids, labels) if any(label != IGNORED for label in labels[1:]) else None

    def prompt(self, row: dict[str, Any]) -> list[int] | None:
        """The tokens before a row's last reply, None where there is no telling. Raises ValueError
        as `encode` does."""
        messages, prompt, labels = (
            row.get("messages") or row.get("conversations"),
            row.get("prompt"),
            row.get("labels"),
        )
        if messages is not None:
            dialogue = _messages(messages, "messages")
            if len(dialogue) < 2 or dialogue[-1]["role"] != "assistant":
                return None
            head = self._render(dialogue[:-1], add_generation_prompt=True)
        elif isinstance(prompt, list):
            head = self._render(_messages(prompt, "prompt"), add_generation_prompt=True)
        elif isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        elif labels is not None:
            begin = next((at for at, label in enumerate(labels) if label != IGNORED), 0)
            return list(row["input_ids"][:begin]) or None
        else:
            return None
        return list(self.tokenizer(head, add_special_tokens=False)["input_ids"])

    def _text(self, text: Any) -> Tokens:
        if not isinstance(text, str) or not text:
            raise ValueError("`text` is not text, or empty")
        if self.assistant_only:
            raise ValueError("`assistant_only_loss` needs messages, and this row is text")
        ids = list(self.tokenizer(self._ended(text))["input_ids"])
        return ids, list(ids)

    def _messages(self, messages: list[dict[str, str]]) -> Tokens:
        ids, mask = self._chat(messages)
        return ids, [token if kept else IGNORED for token, kept in zip(ids, mask)]

    def _completion(self, prompt: Any, completion: Any) -> Tokens:
        if isinstance(prompt, list) and isinstance(completion, list):
            head = self._render(_messages(prompt, "prompt"), add_generation_prompt=True)
            ids, mask = self._chat(
                [*_messages(prompt, "prompt"), *_messages(completion, "completion")]
            )
            prompt_ids = list(self.tokenizer(head, add_special_tokens=False)["input_ids"])
        elif isinstance(prompt, str) and isinstance(completion, str) and completion:
            if self.assistant_only:
                raise ValueError("`assistant_only_loss` needs messages, and this row is text")
            # The end mark belongs to the completion: TRL adds it to that, also where the prompt
            # ends with one.
            prompt_ids = list(self.tokenizer(prompt)["input_ids"])
            ids = list(self.tokenizer(prompt + self._ended(completion))["input_ids"])
            mask = [1] * len(ids)
        else:
            raise ValueError(
                "`prompt` and `completion` must both be text, or both messages, and not empty"
            )
        begin = common_prefix(prompt_ids, ids) if self.completion_only else 0
        return ids, [
            token if kept and at >= begin else IGNORED
            for at, (token, kept) in enumerate(zip(ids, mask))
        ]

    def _chat(self, messages: list[dict[str, str]]) -> tuple[list[int], Sequence[int]]:
        """The tokens of a dialogue, and 1 for each that is trained on."""
        if not self.assistant_only:
            ids = list(
                self.tokenizer(self._render(messages), add_special_tokens=False)["input_ids"]
            )
            return ids, [1] * len(ids)
        found = self.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=self.template,
        )
        if 1 not in found["assistant_masks"]:
            raise ValueError("has no assistant turn to train on")
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _render(self, messages: list[dict[str, str]], **how: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("is a dialogue, and the base's tokenizer has no chat template")
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **how))
        except Exception as error:  # a template raises what it likes
            raise ValueError(
                f"does not suit the chat template: {str(error).splitlines()[0][:200]}"
            ) from error

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end


def marking_template(tokenizer: Any) -> str | None:
    """The chat template that marks the assistant's turns (`{% generation %}`): the tokenizer's own,
    or TRL's for it.

    Raises ValueError when there is none.
    """
    if "{% generation" in (tokenizer.chat_template or "") or "{%- generation" in (
        tokenizer.chat_template or ""
    ):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        return str(get_training_chat_template(tokenizer))
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError("the base's chat template does not mark the assistant's turns") from error


def _tokenized(row: dict[str, Any], completion_only: bool) -> Tokens:
    ids = row["input_ids"]
    masks = [name for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    columns = [ids, *(row[name] for name in ("labels", *masks) if row.get(name) is not None)]
    for column in columns:
        if (
            not isinstance(column, list)
            or not column
            or not all(type(token) is int for token in column)
        ):
            raise ValueError("`input_ids`, labels and masks must be lists of whole numbers")
        if len(column) != len(ids):
            raise ValueError("`input_ids`, labels and masks differ in length")
    if row.get("labels") is not None:
        return ids, row["labels"]
    used = [row[name] for name in masks if completion_only or name != "completion_mask"]
    return ids, [token if all(kept) else IGNORED for token, *kept in zip(ids, *used)]


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is no list of messages, or empty")
    out = []
    for message in value:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = (
            message.get("content", message.get("value")) if isinstance(message, dict) else None
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"`{name}` has a message without `role` and `content` as text")
        out.append(
            {"role": _ROLES.get(role, role) if "role" not in message else role, "content": content}
        )
    return out
