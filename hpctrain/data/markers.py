"""The marker grammar: a document is turns `M text M`, each wrapped in one marker used both as
opener and as closer.

Splitting follows GPT-NeoX's preprocess_sft.py: `re.split` on the literal markers, parts with
nothing but whitespace vanish, no other stripping. On top come checks that the reference lacks: what
does not fit the grammar is a `Fault`, with its offset.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What the reference would take and the grammar refuses. Each can be allowed by name.
ALLOWABLE = {
    "unknown-marker": "text that looks like a marker, `<<<|x|>>>`, stays text",
    "unbalanced": "markers that do not pair up into turns",
    "outside-text": "text outside turns",
    "no-marker": "documents without any marker: plain text (the reference refuses these)",
    "nul": "NUL characters",
    "bom": "a byte order mark at the start of a file, which is removed",
}
SPAN = -1  # in a layout: the next span; any other number is a control token's id

_LOOKS_LIKE_MARKER = re.compile(r"<<<\|(?:(?!\|>>>)[^\n]){0,64}\|>>>")


@dataclass(frozen=True)
class Fault:
    """Why a document does not fit: a kind, words for a person, where in the text (in characters),
    and what to do."""

    kind: str
    what: str
    offset: int = 0
    hint: str = ""


class Splitter:
    """Splits documents into control tokens and spans, counting in `special` whatever was out of the
    ordinary."""

    def __init__(self, ids: Mapping[str, int], allow: Iterable[str] = ()):
        self.special: Counter[str] = Counter()
        self._ids = dict(ids)
        self._allow = frozenset(allow)
        self._pattern = re.compile("(" + "|".join(re.escape(marker) for marker in ids) + ")")
        self._prefixed = sum(marker.count("<<<|") for marker in ids) == len(ids)
        self._turn = {marker: (number, SPAN, number) for marker, number in ids.items()}
        self._usual: tuple[str, str, str, int, tuple[int, ...]] | None = None
        if len(ids) >= 2 and all(marker.startswith("<<<|") for marker in ids) and self._prefixed:
            # With "<<<|" four times in a text, and these markers at its start, in its middle and at
            # its end, there are no others.
            (one, first), (two, second) = list(ids.items())[:2]
            self._usual = (
                one,
                one + two,
                two,
                len(one),
                (first, SPAN, first, second, SPAN, second),
            )
        self._empty_turn = {marker: (number, number) for marker, number in ids.items()}

    def split(self, text: str, layout: list[int], spans: list[str]) -> Fault | None:
        """Append the document's control ids and `SPAN`s to `layout` and its spans to `spans`; on a
        fault append nothing."""
        if self._usual:
            # By far the most documents are one question and one answer: the general way below, in
            # fewer steps.
            first, between, last, skip, both = self._usual
            middle = text.find(between, skip)
            if (
                middle > 0
                and text.startswith(first)
                and text.endswith(last)
                and text.count("<<<|") == 4
            ):
                question, answer = text[skip:middle], text[middle + len(between) : -len(last)]
                if (
                    not question.isspace()
                    and question
                    and not answer.isspace()
                    and answer
                    and "\0" not in text
                ):
                    layout += both
                    spans.append(question)
                    spans.append(answer)
                    return None
        parts = self._pattern.split(text)
        opened, outside = parts[1::4], parts[0::4]
        if (
            len(parts) % 4 != 1
            or not opened
            or opened != parts[3::4]
            or (text.count("<<<|") != len(parts) // 2 if self._prefixed else "<<<|" in text)
            or "\0" in text
        ):
            return self._slow(text, parts, layout, spans)
        between = "".join(outside)
        if between:
            if not between.isspace():
                return self._slow(text, parts, layout, spans)
            self.special["whitespace between turns"] += sum(map(bool, outside))
        for marker, span in zip(opened, parts[2::4]):
            if span and not span.isspace():
                layout += self._turn[marker]
                spans.append(span)
            else:
                layout += self._empty_turn[marker]
                self.special["empty turns"] += 1
        return None

    def chat(
        self, turns: Iterable[tuple[int, str]], layout: list[int], spans: list[str]
    ) -> Fault | None:
        """As `split`, from (control id, text) of each message; text holding a marker is a fault, as
        it would end the turn."""
        new_layout: list[int] = []
        new_spans: list[str] = []
        for number, text in turns:
            found = self._pattern.search(text)
            if found:
                return Fault(
                    "marker", f"a message holds the marker `{found.group()}`", found.start()
                )
            fault = self._span_fault(text, 0)
            if fault:
                return fault
            if text and not text.isspace():
                new_layout += (number, SPAN, number)
                new_spans.append(text)
            else:
                new_layout += (number, number)
                self.special["empty turns"] += 1
        layout += new_layout
        spans += new_spans
        return None

    def _slow(
        self, text: str, parts: list[str], layout: list[int], spans: list[str]
    ) -> Fault | None:
        """The same for documents that are not plain turns: find the fault, or, where all of it is
        allowed, split as is."""
        fault = self._grammar_fault(parts)
        offset = 0
        for index, part in enumerate(parts):
            found = self._span_fault(part, offset) if index % 2 == 0 else None
            if found and (fault is None or found.offset < fault.offset):
                fault = found
            offset += len(part)
        if fault:
            return fault
        for index, part in enumerate(parts):
            if index % 2:
                layout.append(self._ids[part])
            elif part and not part.isspace():
                layout.append(SPAN)
                spans.append(part)
            elif part:
                self.special["whitespace between turns"] += 1
        return None

    def _span_fault(self, text: str, offset: int) -> Fault | None:
        position = text.find("\0")
        if position >= 0:
            if "nul" not in self._allow:
                return Fault("nul", "a NUL character", offset + position)
            self.special["nul characters"] += text.count("\0")
        if "<<<|" in text:
            found = _LOOKS_LIKE_MARKER.search(text)
            if found:
                if "unknown-marker" not in self._allow:
                    return Fault(
                        "unknown-marker",
                        f"unknown marker `{found.group()}`",
                        offset + found.start(),
                    )
                self.special["unknown markers kept as text"] += len(
                    _LOOKS_LIKE_MARKER.findall(text)
                )
        return None

    def _grammar_fault(self, parts: list[str]) -> Fault | None:
        if len(parts) == 1:
            return self._judge("no-marker", "no marker: not a dialogue", 0)
        if sum(1 for part in parts if part.strip()) <= 1:
            # The reference's `len(parts) <= 1`: one lonely marker.
            return self._judge("no-marker", "a single marker and nothing else", 0)
        open_marker = ""
        opened_at = offset = 0
        for index, part in enumerate(parts):
            fault = self._part_fault(part, index % 2 == 1, open_marker, offset)
            if fault:
                return fault
            if index % 2 == 1:
                # The same marker closes its turn; any other opens one.
                closes = open_marker == part
                open_marker, opened_at = ("", opened_at) if closes else (part, offset)
            offset += len(part)
        if open_marker:
            return self._judge(
                "unbalanced", f"the turn opened by `{open_marker}` is never closed", opened_at
            )
        return None

    def _part_fault(self, part: str, is_marker: bool, inside: str, offset: int) -> Fault | None:
        """Text outside of turns, or a marker within the turn that `inside` opened."""
        if not is_marker and not inside and part.strip():
            what = f"text outside turns: `{part.strip()[:40]}`"
            return self._judge("outside-text", what, offset)
        if is_marker and inside and inside != part:
            what = f"`{part}` inside a turn opened by `{inside}`"
            return self._judge("unbalanced", what, offset)
        return None

    def _judge(self, kind: str, what: str, offset: int) -> Fault | None:
        if kind not in self._allow:
            return Fault(kind, what, offset)
        self.special[f"allowed: {kind}"] += 1
        return None
