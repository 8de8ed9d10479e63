"""Preference records in one shape, with their places.

Understood are the columns `prompt`, `chosen`, `rejected` as text or as lists of messages, replies
that begin with the same messages instead of a prompt, and `system`, `question`, `chosen`,
`rejected` (orca_dpo_pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import UsageError
from hpctrain.train.core.data_files import parsed_rows

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Record:
    """One preference: all three are text, or all three are messages, `prompt` the part that both
    replies answer."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    where: str


def read_records(files: list[str], limit: int | None = None) -> list[Record]:
    """The records of the files, at most `limit`.

    Raises UsageError with the place of every bad record (the first 20 of them), EnvironmentFault
    for unreadable files.
    """
    records = list(parsed_rows(files, parse_record, limit))
    if not records:
        raise UsageError("no preference pairs in it", where=files[0] if files else "")
    return records


def parse_record(row: Any, where: str = "") -> Record:
    """A row in any of the shapes understood. Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("is not an object with columns")
    lost = [name for name in ("chosen", "rejected") if row.get(name) in (None, "", [])]
    if lost:
        raise ValueError(f"`{'` and `'.join(lost)}` {'are' if lost[1:] else 'is'} missing or empty")
    chosen, rejected = _part(row, "chosen"), _part(row, "rejected")
    if type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text, or both messages")
    prompt = _prompt(row)
    if prompt is None:
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise ValueError("`prompt` (or `question`) is missing or empty")
        same = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not prompt:
            raise ValueError("there is no `prompt`, and the replies begin with different messages")
    if isinstance(prompt, str) and isinstance(chosen, list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = (
            [{"role": "assistant", "content": str(text)}] for text in (chosen, rejected)
        )
    return Record(prompt, chosen, rejected, where)


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with together."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(number for number, (a, b) in enumerate(zip(one, other)) if a != b)


def _prompt(row: dict[str, Any]) -> str | Messages | None:
    """The row's own prompt, None where it has none."""
    if row.get("prompt") not in (None, ""):
        return _part(row, "prompt")
    if row.get("question") in (None, ""):
        return None
    asked = [("system", "system")] if row.get("system") else []
    asked.append(("user", "question"))
    return [{"role": role, "content": _text(row, name)} for role, name in asked]


def as_text(record: Record) -> Record:
    """A record of messages as plain text, for tokenizers without a chat template; roles are left
    out."""

    def joined(messages: str | Messages) -> str:
        return (
            messages
            if isinstance(messages, str)
            else "\n".join(message["content"] for message in messages)
        )

    prompt = joined(record.prompt)
    if isinstance(record.prompt, list):
        prompt += "\n"
    return Record(prompt, joined(record.chosen), joined(record.rejected), record.where)


def _part(row: dict[str, Any], name: str) -> str | Messages:
    value = row[name]
    return value if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is neither text nor a list of messages")
    out = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"`{name}` has a message without a `role`")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"`{name}` has a message whose `content` is not text")
        out.append({"role": message["role"], "content": message["content"]})
    return out


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"`{name}` is not text")
    return str(row[name])
