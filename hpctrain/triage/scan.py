"""Finds the few interesting lines in very large logs: fixed memory, any bytes, hundreds of MB a
second on one core.

Every pattern that triage knows contains a literal anchor of at least five bytes. An anchor of that
length covers, wherever it starts, a four-byte gram at an even address; so numpy looks up every
second position's gram in a small hash table (the idea of Wu and Manber, "A fast algorithm for
multi-pattern searching", 1994), compares the words beside it with what its anchors ask of them, and
Python sees only what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hpctrain.triage.normal import Undresser
from hpctrain.triage.uniform import Template, all_alike, uniform_end

MIN_ANCHOR = 5
# bytes of a line that are looked at on either side of an anchor; junk has no line ends
MAX_LINE = 16 * 1024
UNIFORM = -1  # the anchor of a hit that stands for a whole stretch of step lines
_RETRY = 128 * 1024  # bytes that are searched after a block that was not such a stretch
CHUNK = 256 * 1024  # bytes read at a time: the working arrays then stay in the second-level cache
_SLOTS_BITS = 15
_MOST_OF_LINE = 8 * MAX_LINE  # bytes that the hits of one line may show, each the whole of it
_BLOCK_LINES = 64  # step lines of which one is read, where all are alike
_FEW = 60  # places of one gram below which a loop is faster after all
_MANY = 400  # gram hits in one piece beyond which numpy checks them faster than a loop


class Hit(NamedTuple):
    """One anchor in one line. `line` has neither line end nor carriage returns; `number` counts
    line feeds from 1.

    `offset` is the line's first byte in the log. `context` is what was read together with it and
    `position` the anchor's place in it, to look around.
    """

    anchor: int
    line: bytes
    number: int
    offset: int
    position: int
    context: bytes
    start: int  # of the line in `context`


class Matcher:
    """Which of the anchors occur where, in bytes. Raises ValueError for an anchor shorter than five
    bytes."""

    def __init__(self, anchors: Sequence[bytes]):
        import numpy as np

        short = [anchor for anchor in anchors if len(anchor) < MIN_ANCHOR]
        if short:
            raise ValueError(f"anchors shorter than {MIN_ANCHOR} bytes: {short}")
        self._np = np
        self.anchors = tuple(anchors)
        self._letters = [np.frombuffer(anchor, dtype=np.uint8) for anchor in self.anchors]
        # gram -> [(anchor index, offset of the gram in it)]; one even and one odd offset each, the
        # rarest of them.
        self._grams: dict[int, list[tuple[int, int]]] = {}
        for index, anchor in enumerate(self.anchors):
            for parity in (0, 1):
                offset = min(
                    range(parity, len(anchor) - 3, 2),
                    key=lambda place: _commonness(anchor[place : place + 4]),
                )
                gram = int.from_bytes(anchor[offset : offset + 4], "little")
                self._grams.setdefault(gram, []).append((index, offset))
        self._multiplier, self._table, self._exact = self._build()
        self._beside = [self._words_beside(step) for step in (1, -1)]

    def _words_beside(self, step: int) -> tuple[int, Any, Any]:
        """(step, mask, value) per slot: what all anchors of a gram ask of the four bytes after
        (step 1) or before (-1) it."""
        masks, values = (self._np.zeros(2**_SLOTS_BITS, dtype=self._np.uint32) for _ in range(2))
        for gram, places in self._grams.items():
            mask, value = 2**32 - 1, None
            for index, offset in places:
                anchor = self.anchors[index]
                word = (
                    anchor[offset + 4 : offset + 8]
                    if step > 0
                    else anchor[max(offset - 4, 0) : offset]
                )
                free = 8 * (4 - len(word))
                asked = (2**32 - 1) >> free if step > 0 else (2**32 - 1) << free & (2**32 - 1)
                number = int.from_bytes(word, "little") << (0 if step > 0 else free)
                mask &= asked if value is None else asked & ~(value ^ number)
                value = number if value is None else value
            slot = (gram * int(self._multiplier) & (2**32 - 1)) >> (32 - _SLOTS_BITS)
            masks[slot], values[slot] = mask, (value or 0) & mask
        return step, masks, values

    def _build(self) -> tuple[Any, Any, Any]:
        """A multiplier under which no two grams share a slot, the slots in use, and the gram of
        each slot."""
        np = self._np
        grams = np.array(sorted(self._grams), dtype=np.uint32)
        multiplier = np.uint32(2654435761)
        for _ in range(10_000):
            slots = (grams * multiplier) >> np.uint32(32 - _SLOTS_BITS)
            if len(set(slots.tolist())) == len(slots):
                break
            multiplier = np.uint32((int(multiplier) * 1664525 + 1013904223) % 2**32 | 1)
        table = np.zeros(2**_SLOTS_BITS, dtype=bool)
        exact = np.zeros(2**_SLOTS_BITS, dtype=np.uint32)
        table[slots], exact[slots] = True, grams
        return multiplier, table, exact

    def find(self, text: bytes) -> list[tuple[int, int]]:
        """(position, index of the anchor) of every occurrence, in order of position."""
        np, found = self._np, []
        shift = np.uint32(32 - _SLOTS_BITS)
        for start in (0, 2):
            count = (len(text) - start) // 4
            if count <= 0:
                continue
            grams = np.frombuffer(text, dtype="<u4", count=count, offset=start)
            slots = (grams * self._multiplier) >> shift
            places = np.flatnonzero(self._table.take(slots))
            places = places[self._exact[slots[places]] == grams[places]] if len(places) else places
            for step, masks, values in self._beside if len(places) else ():
                slot, beside = slots[places], places + step
                words = grams.take(beside, mode="clip")
                fits = (words & masks[slot]) == values[slot]
                places = places[fits | (beside < 0) | (beside >= count)]
            if len(places) > _MANY:
                found += self._verify_many(text, places * 4 + start, grams[places])
                continue
            for place, gram in zip((places * 4 + start).tolist(), grams[places].tolist()):
                for index, offset in self._grams[gram]:
                    if place >= offset and text.startswith(self.anchors[index], place - offset):
                        found.append((place - offset, index))
        if found:
            found.sort()
        return found

    def _verify_many(self, text: bytes, places: Any, grams: Any) -> list[tuple[int, int]]:
        """The same check for many places at once: gram by gram, the anchor's other bytes against
        the text's."""
        np, found = self._np, []
        letters = np.frombuffer(text, dtype=np.uint8)
        order = np.argsort(grams, kind="stable")
        places, grams = places[order], grams[order]
        edges = np.flatnonzero(np.diff(grams)) + 1
        for low, high in zip([0, *edges.tolist()], [*edges.tolist(), len(grams)]):
            for index, offset in self._grams[int(grams[low])]:
                anchor = self._letters[index]
                starts = places[low:high] - offset
                if high - low < _FEW:
                    literal = self.anchors[index]
                    found += [
                        (start, index)
                        for start in starts.tolist()
                        if start >= 0 and text.startswith(literal, start)
                    ]
                    continue
                starts = starts[(starts >= 0) & (starts + len(anchor) <= len(text))]
                for column in range(len(anchor)):
                    starts = starts[letters[starts + column] == anchor[column]]
                    if not len(starts):
                        break
                found += [(position, index) for position in starts.tolist()]
        return found


class LineScanner:
    """Feeds a log in pieces of any size and gives the lines with an anchor. State: one piece and
    one unfinished line.

    `until` tells where, at the end of a text of whole lines, something begins that needs its next
    lines to be judged (-1: nothing); those are kept back. With a `template`, of a stretch of
    healthy step lines only the last is given, as a hit with the anchor UNIFORM; then
    `uniform_steps` tells how many it stands for. Lines come as `normal.plain` leaves them; from
    the first that it changed on, `moved`, offsets are not those of the file.
    """

    def __init__(self, matcher: Matcher, until: Callable[[bytes], int] | None = None):
        self._matcher, self._until = matcher, until
        self._carry = b""
        self._lines_before = 0  # line feeds before `_carry`
        self._bytes_before = 0  # bytes before `_carry`
        self._skip_to = self._line_end = 0
        self._undresser, self.moved = Undresser(), False
        self.template: Template | None = None
        self.uniform_steps = 0
        self.quiet_steps = 0  # healthy step lines passed over since the last hit
        self.num_bytes = 0
        self.num_nul = 0

    @property
    def num_lines(self) -> int:
        """Line feeds so far, and one more for an unfinished last line."""
        return self._lines_before + bool(self._carry)

    def feed(self, piece: bytes) -> Iterator[Hit]:
        """The hits in all lines that `piece` completes. Take all of them before feeding more."""
        self.num_bytes += len(piece)
        self.num_nul += piece.count(0)
        text = self._carry + piece if self._carry else piece
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        endless = len(text) - end > MAX_LINE
        if endless:
            end = len(text)  # no line end in sight: judge what there is, rather than keep it
        whole = self._plain(text[:end] if end < len(text) else text)
        begin = self._until(whole) if self._until is not None and not endless else -1
        if begin >= 0:  # what belongs together is judged together
            self._carry = whole[begin:] + text[end:]
            return self._hits(whole[:begin])
        self._carry = text[end:]
        return self._hits(whole)

    def _plain(self, text: bytes) -> bytes:
        out = self._undresser.plain(text)
        self.moved = self.moved or len(out) != len(text)
        return out

    def skip_line(self) -> None:
        """Give no further hits in the line of the last one."""
        self._skip_to = self._line_end

    def close(self) -> Iterator[Hit]:
        """The hits in the unfinished last line."""
        text, self._carry = self._carry, b""
        return self._hits(self._plain(text))

    def _hits(self, text: bytes) -> Iterator[Hit]:
        start, self._skip_to = 0, 0
        while start < len(text):
            end, count = uniform_end(text, start, self.template) if self.template else (start, 0)
            if count:
                assert self.template
                self.uniform_steps = count
                position = text.rfind(self.template.key, start, end)
                self._lines_before += text.count(b"\n", start, position)
                yield self._hit(UNIFORM, text, position, self._lines_before + 1)
                self._lines_before += text.count(b"\n", position, end)
            else:
                end = len(text)
                if self.template and end - start > _RETRY:
                    end = text.find(b"\n", start + _RETRY) + 1 or end
                yield from self._lines(text, start, end)
            start = end
        self._bytes_before += len(text)

    def _lines(self, text: bytes, begin: int, stop: int) -> Iterator[Hit]:
        counted, number, looked_at = begin, self._lines_before, 0
        self._line_end = begin
        part = text[begin:stop] if begin or stop < len(text) else text
        found = self._matcher.find(part)
        quiet = self._quiet(text, begin, found) if self.template else {}
        for place, anchor in found:
            position = begin + place
            if position < self._skip_to:
                continue
            if quiet and (end := quiet.get(position)):
                self.quiet_steps += 1
                self._skip_to = end
                continue
            if position >= self._line_end:
                looked_at = 0
            elif looked_at > _MOST_OF_LINE:
                continue
            number += text.count(b"\n", counted, position)
            counted = position
            hit = self._hit(anchor, text, position, number + 1)
            looked_at += len(hit.line)
            yield hit
        self._lines_before = number + text.count(b"\n", counted, stop)

    def _quiet(self, text: bytes, begin: int, found: list[tuple[int, int]]) -> dict[int, int]:
        """The ends of healthy step lines between others, by the places of their anchors: all but
        the last of each block, which is read."""
        assert self.template
        out: dict[int, int] = {}
        places = [begin + place for place, anchor in found if anchor == self.template.anchor]
        for at in range(0, len(places), _BLOCK_LINES):
            some = places[at : at + _BLOCK_LINES]
            bounds = [_line_at(text, position) for position in some]
            if all_alike([text[start:end] for start, end in bounds], self.template):
                out.update((place, end) for place, (_, end) in zip(some[:-1], bounds))
        return out

    def _hit(self, anchor: int, text: bytes, position: int, number: int) -> Hit:
        start, end = _line_at(text, position)
        self._line_end = end
        return Hit(
            anchor, text[start:end], number, self._bytes_before + start, position, text, start
        )


def _line_at(text: bytes, position: int) -> tuple[int, int]:
    """(start, end) of the line around a place, between line ends and carriage returns."""
    first = max(position - MAX_LINE, 0)
    start = text.rfind(b"\n", first, position) + 1 or first
    start = text.rfind(b"\r", start, position) + 1 or start
    end = text.find(b"\n", position, position + MAX_LINE)
    if end < 0:
        end = min(position + MAX_LINE, len(text))
    turn = text.find(b"\r", position, end)
    return start, turn if turn >= 0 else end


# How common a byte is in logs, roughly; only the order matters, and only for speed.
_COMMON = {
    byte: rank for rank, byte in enumerate(b" etaoinsrldcumpgh_.:/,-f=0b[]12y'vw3\"4()5kz6789xjq")
}


def _commonness(gram: bytes) -> int:
    """A guess at how often a gram stands in logs: least where two words meet, or with capitals and
    punctuation."""
    score = sum(60 - _COMMON.get(byte, 60) for byte in gram)
    meeting = any(not chr(byte).isalnum() for byte in gram[1:3])
    return score - 60 * meeting - 30 * sum(chr(byte).isupper() for byte in gram)
