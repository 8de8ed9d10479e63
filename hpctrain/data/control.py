"""Control tokens as configuration: which marker in the text stands for which piece, checked against
the model.

A marker (`<<<|user|>>>`) exists only in the data; the piece (`<|user|>`) only in the model. Text
between markers must never be able to become a control token, so a piece has to be a control symbol:
SentencePiece never makes one from text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hpctrain.base.errors import Problem, UsageError
from hpctrain.data.spm import BYTE, CONTROL, TYPE_NAMES, UNKNOWN, USER_DEFINED, SpmModel

# The markers and ids that GPT-NeoX's preprocess_sft.py has in its code (`special_ids = [7, 8]`).
DEFAULT_TOKENS = (("<<<|user|>>>", "<|user|>", 7), ("<<<|assistant|>>>", "<|assistant|>", 8))
DEFAULT_EOD = "<|endoftext|>"


@dataclass(frozen=True)
class ControlToken:
    """A marker, the piece it stands for, its id in the model, and the chat role that it wraps
    (`user`)."""

    marker: str
    piece: str
    id: int
    role: str


@dataclass(frozen=True)
class Control:
    """The checked control tokens. `eod_id` is None when no end-of-document token is appended.

    `forgeable` are the ids of user-defined control pieces, which text can spell; encoded text
    holding one is an error.
    """

    tokens: tuple[ControlToken, ...]
    eod_piece: str
    eod_id: int | None
    forgeable: tuple[int, ...] = ()

    def ids(self) -> Mapping[str, int]:
        """Id by marker."""
        return {token.marker: token.id for token in self.tokens}

    def roles(self) -> Mapping[str, int]:
        """Id by chat role."""
        return {token.role: token.id for token in self.tokens}


def resolve(
    model: SpmModel,
    tokens: Iterable[str] = (),
    *,
    append_eod: bool = True,
    eod_piece: str = DEFAULT_EOD,
    allow_user_defined: bool = False,
) -> Control:
    """Control tokens looked up in `model`; with none given, user=7 and assistant=8 are verified, as
    the reference has them.

    Each of `tokens` is MARKER=PIECE, or MARKER=PIECE=ID to demand an id. Raises UsageError with
    every problem at once: a piece that is absent, that is not a control symbol, or that has another
    id; markers that are equal, empty or inside each other.
    """
    problems: list[Problem] = []
    wanted = [_parse(text, problems) for text in tokens] or list(DEFAULT_TOKENS)
    ids = {piece: index for index, piece in reversed(list(enumerate(model.pieces)))}
    found: list[ControlToken] = []
    forgeable: list[int] = []
    for item in wanted:
        if item is None:
            continue
        marker, piece, want_id = item
        number = _look_up(
            model, ids, piece, f"the control token of `{marker}`", allow_user_defined, problems
        )
        if number is None:
            continue
        if want_id is not None and number != want_id:
            problems.append(
                Problem(
                    f"`{piece}` has id {number} in this model, not {want_id}",
                    where=model.path,
                    why="7 and 8 are the ids that preprocess_sft.py inserts" if not tokens else "",
                    hint=f"if {number} is right: --control-token '{marker}={piece}'",
                )
            )
        if model.types[number] == USER_DEFINED:
            forgeable.append(number)
        found.append(ControlToken(marker, piece, number, _role(marker, piece)))
    problems.extend(_clashes(found))
    eod_id = None
    if append_eod:
        eod_id = _look_up(
            model, ids, eod_piece, "the end-of-document token", allow_user_defined, problems
        )
    if problems:
        raise UsageError(problems)
    return Control(tuple(found), eod_piece if append_eod else "", eod_id, tuple(forgeable))


def _parse(text: str, problems: list[Problem]) -> tuple[str, str, int | None] | None:
    parts = text.split("=")
    number = None
    if len(parts) >= 3 and parts[-1].isascii() and parts[-1].isdigit():
        number = int(parts.pop())
    if len(parts) != 2 or not all(part.strip() for part in parts):
        problems.append(
            Problem(
                f"`{text}` is not MARKER=PIECE",
                where="--control-token",
                hint="for example --control-token '<<<|user|>>>=<|user|>'",
            )
        )
        return None
    return parts[0], parts[1], number


def _look_up(
    model: SpmModel,
    ids: Mapping[str, int],
    piece: str,
    what: str,
    allow_user_defined: bool,
    problems: list[Problem],
) -> int | None:
    number = ids.get(piece)
    if number is None:
        problems.append(
            Problem(
                f"this model has no piece `{piece}`, {what}",
                where=model.path,
                why="its id would silently be that of the unknown token",
                hint=_similar(model, piece)
                or (
                    "give another with --eod, or --no-append-eod"
                    if "end-of" in what
                    else "see --control-token"
                ),
            )
        )
        return None
    kind = model.types[number]
    if kind == CONTROL or (kind == USER_DEFINED and allow_user_defined):
        return number
    if kind == USER_DEFINED:
        why = (
            "text that spells a user-defined piece becomes that token, so that data could forge a"
            " turn"
        )
        hint = "--allow-user-defined accepts it; every span is then checked for forged tokens"
    else:
        why = (
            "text can become this token"
            if kind not in (BYTE, UNKNOWN)
            else "it stands for other text"
        )
        hint = (
            "train the model with it in control_symbols, or choose another piece with"
            " --control-token"
        )
    problems.append(
        Problem(
            f"`{piece}` (id {number}), {what}, is not a control symbol of this model but"
            f" {TYPE_NAMES.get(kind, kind)}",
            where=model.path,
            why=why,
            hint=hint,
        )
    )
    return None


def _similar(model: SpmModel, piece: str) -> str:
    control = [model.pieces[index] for index in model.ids_of_type(CONTROL, USER_DEFINED)]
    near = difflib.get_close_matches(piece, control[:2000], n=3, cutoff=0.5)
    return "its control symbols include " + ", ".join(f"`{name}`" for name in near) if near else ""


def _clashes(tokens: list[ControlToken]) -> Iterable[Problem]:
    for index, token in enumerate(tokens):
        for other in tokens[index + 1 :]:
            if token.marker in other.marker or other.marker in token.marker:
                yield Problem(
                    f"the markers `{token.marker}` and `{other.marker}` overlap",
                    where="--control-token",
                )
            if token.id == other.id:
                yield Problem(
                    f"`{token.marker}` and `{other.marker}` both stand for id {token.id}",
                    where="--control-token",
                )


def _role(marker: str, piece: str) -> str:
    for text in (marker, piece):
        name = text.strip("<>|[]{}() ")
        if name:
            return name.lower()
    return marker
