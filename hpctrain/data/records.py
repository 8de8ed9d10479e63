"""One record to one dialogue: JSON read strictly, then `text` or chat `messages` found in it.

Nothing is repaired: what cannot be read exactly as written is a `Fault`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpctrain.data.control import Control
from hpctrain.data.markers import Fault, Splitter

_ONE_A_LINE = "JSONL has one JSON object a line"
_ONE_STRING = "parts of a message become one string before this, and only text has tokens"


@dataclass(frozen=True)
class RecordForm:
    """Where a record keeps its dialogue: `text_key`, or `messages_key` (chat), and perhaps
    `response_key` for the last reply.

    `system` says what becomes of system messages when no control token has that role: `error`, or
    `prepend` (put before the next user message, with an empty line between).
    """

    text_key: str = "text"
    messages_key: str = "messages"
    response_key: str = ""
    system: str = "error"


def json_reader() -> tuple[Callable[[bytes], Any], bool]:
    """The faster strict parser there is, and whether lone surrogates pass it: orjson, else json."""
    try:
        import orjson
    except ImportError:
        return lambda line: json.loads(line.decode("utf-8")), True
    return orjson.loads, False


def read_line(line: bytes) -> tuple[Any, Fault | None]:
    """The record in a line that the fast parser refused, or why it is none. NaN and Infinity in
    other keys are fine."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = (
            "UTF-16 text" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "bytes that are not UTF-8"
        )
        return None, Fault("utf-8", what, error.start)
    if text.startswith("\ufeff"):
        return None, Fault("bom", "a byte order mark", 0)
    try:
        return json.loads(text), None
    except RecursionError:
        return None, Fault("json", "JSON nested too deeply")
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8", "surrogatepass"))
        if "\0" in text:
            return None, Fault(
                "nul", "a raw NUL byte, which JSON does not allow", line.index(b"\0")
            )
        return None, Fault("json", f"not JSON: {error.msg}", offset, _ONE_A_LINE)
    except ValueError:
        return None, Fault("json", "not JSON: a number with thousands of digits")


class Extractor:
    """Turns records into control ids and spans, through a `Splitter`."""

    def __init__(self, form: RecordForm, control: Control, splitter: Splitter):
        self._form, self._splitter = form, splitter
        self._roles = control.roles()
        self._special = splitter.special
        # Only json lets lone surrogates through; orjson refuses them, and checking every text again
        # costs time.
        self.suspicious = True

    def add(self, record: Any, layout: list[int], spans: list[str]) -> Fault | None:
        """Append what `record` holds to `layout` and `spans`; an empty text appends nothing, and is
        counted."""
        if type(record) is not dict:
            return Fault("json", f"the record is {_kind(record)}, not an object", 0, _ONE_A_LINE)
        text = record.get(self._form.text_key)
        if type(text) is str:
            if self.suspicious and _has_surrogate(text):
                return _surrogate(text)
            if self._form.messages_key in record:
                self._special[
                    f"records with a text and {self._form.messages_key}: the text was taken"
                ] += 1
            if not text:
                self._special["empty documents, dropped"] += 1
                return None
            return self._splitter.split(text, layout, spans)
        if text is not None:
            return Fault("text", f"`{self._form.text_key}` is {_kind(text)}, not a string")
        if self._form.messages_key in record:
            return self._chat(record, layout, spans)
        if self._form.text_key in record:
            return Fault("text", f"`{self._form.text_key}` is null")
        return Fault(
            "text", f"neither `{self._form.text_key}` nor `{self._form.messages_key}` is there"
        )

    def _chat(self, record: dict[str, Any], layout: list[int], spans: list[str]) -> Fault | None:
        messages = self._messages(record)
        if isinstance(messages, Fault):
            return messages
        if not messages:
            self._special["empty documents, dropped"] += 1
            return None
        turns: list[tuple[int, str]] = []
        system = ""
        for number, message in enumerate(messages):
            fault = self._message_fault(number, message)
            if fault:
                return fault
            role, content = message["role"], message["content"]
            control_id = self._roles.get(role)
            if control_id is None and role == "system" and self._form.system == "prepend":
                system += content + "\n\n"
                self._special["system messages put before the user's"] += 1
                continue
            if control_id is None:
                return self._unknown_role(number, role)
            if system and role != "user":
                what = f"`{self._at(number)}`: a system message is not followed by one of the user"
                return Fault("role", what)
            turns.append((control_id, system + content))
            system = ""
        if system:
            return Fault("role", "a system message is not followed by one of the user")
        return self._splitter.chat(turns, layout, spans)

    def _messages(self, record: dict[str, Any]) -> list[Any] | Fault:
        """The record's messages, and its reply as the last of them."""
        key, reply_key = self._form.messages_key, self._form.response_key
        messages = record[key]
        if not isinstance(messages, list):
            return Fault("text", f"`{key}` is {_kind(messages)}, not a list of messages")
        if not reply_key:
            return messages
        reply = record.get(reply_key)
        if not isinstance(reply, str):
            return Fault("text", f"`{reply_key}` is {_kind(reply)}, not a string")
        return [*messages, {"role": "assistant", "content": reply}]

    def _at(self, number: int) -> str:
        return f"{self._form.messages_key}[{number}]"

    def _message_fault(self, number: int, message: Any) -> Fault | None:
        """What makes it none: a message has a role and a content, both of them strings."""
        if not isinstance(message, dict):
            return Fault("text", f"`{self._at(number)}` is {_kind(message)}, not an object")
        for key in ("role", "content"):
            value = message.get(key)
            if not isinstance(value, str):
                what = f"`{self._at(number)}.{key}` is {_kind(value)}, not a string"
                parts = isinstance(message.get("content"), list)
                return Fault("text", what, 0, _ONE_STRING if parts else "")
        if self.suspicious and _has_surrogate(message["content"]):
            return _surrogate(message["content"])
        return None

    def _unknown_role(self, number: int, role: str) -> Fault:
        token = shlex.quote(f"<<<|{role}|>>>=<|{role}|>")
        hint = f"give the role a token: --control-token {token}"
        if role == "system":
            hint += "; or --system prepend puts it before the user's message"
        what = (
            f"`{self._at(number)}` has the role `{role}`, which no control token stands for (known:"
            f" {', '.join(self._roles)})"
        )
        return Fault("role", what, 0, hint)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _surrogate(text: str) -> Fault:
    offset = next(index for index, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return Fault(
        "surrogate",
        f"the lone surrogate `\\u{ord(text[offset]):04x}`, which is no character",
        offset,
    )


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        bytes: "bytes",
    }
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
