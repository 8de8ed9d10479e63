"""A dataset for human eyes: text, pieces and ids, and which tokens the SFT loss masks leave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpctrain.errors import Problem, UsageError
from hpctrain.tokenize.encode import processor
from hpctrain.tokenize.indexed_dataset import Dataset
from hpctrain.tokenize.spm import SpmModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LossMask:
    """The three settings of the Tilde NeoX fork (megatron/utils.py), by token id; `pairs` is open, close, open, close, …"""

    pairs: tuple[int, ...] = ()
    alternating: tuple[int, ...] = ()
    individual: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that are all trained, or all masked."""

    trained: bool
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Document:
    index: int
    num_tokens: int
    num_trained: int
    stretches: tuple[Stretch, ...]
    problems: tuple[Problem, ...] = field(default=())


def default_mask(control: dict[str, Any] | None, model: SpmModel) -> LossMask:
    """What the fork's SFT.md recommends: user turns and the opening assistant token are not trained."""
    roles: dict[str, int] = {}
    if control:
        roles = {token["role"]: token["id"] for token in control["tokens"]}
    else:
        names = {piece: index for index, piece in enumerate(model.pieces)}
        roles = {role: names[f"<|{role}|>"] for role in ("user", "assistant") if f"<|{role}|>" in names}
    asked = [number for role, number in roles.items() if role != "assistant"]
    return LossMask(
        tuple(number for one in asked for number in (one, one)),
        (roles["assistant"],) if "assistant" in roles else (),
    )


def masked(tokens: NDArray[Any], mask: LossMask) -> NDArray[np.bool_]:
    """By token: whether it is left out of the loss when it is the one to be predicted.

    Pairs: everything from open to close, both included; equal ids alternate. Alternating: the 1st, 3rd, … occurrence.
    Counted within the document, which is what a row sees when all its documents are closed.
    """
    import numpy as np

    if len(mask.pairs) % 2:
        raise UsageError("loss mask pairs need an even number of ids", where="--mask-pairs")
    out = np.zeros(len(tokens), dtype=bool)
    for begin, end in zip(mask.pairs[::2], mask.pairs[1::2]):
        opened = np.cumsum(tokens == begin)
        inside = opened % 2 == 1 if begin == end else opened > np.cumsum(tokens == end)
        out |= inside | (tokens == end)
    for number in mask.alternating:
        here = tokens == number
        out |= here & (np.cumsum(here) % 2 == 1)
    for number in mask.individual:
        out |= tokens == number
    return out


def documents(dataset: Dataset, model: SpmModel, mask: LossMask, first: int, count: int) -> Iterator[Document]:
    """`count` documents from number `first`. Raises UsageError when an id is not in the model's vocabulary."""
    import numpy as np

    sp = processor(model)
    for index in range(first, min(first + count, len(dataset))):
        tokens = np.asarray(dataset[index]).astype(np.int64)
        if len(tokens) and (int(tokens.max()) >= model.vocab_size or int(tokens.min()) < 0):
            raise UsageError(
                f"document {index} has id {int(tokens.max())}, but the model has {model.vocab_size} pieces",
                where=dataset.prefix,
                hint="is this the tokenizer that the dataset was made with?",
            )
        left_out = masked(tokens, mask)
        changes = [0, *(np.flatnonzero(np.diff(left_out)) + 1).tolist(), len(tokens)]
        stretches = tuple(
            _stretch(sp, model, tokens[begin:end].tolist(), not left_out[begin])
            for begin, end in zip(changes, changes[1:])
            if end > begin
        )
        yield Document(
            index, len(tokens), int((~left_out).sum()), stretches, tuple(_unclosed(tokens, mask, index, dataset.prefix))
        )


def printable(text: str) -> str:
    """`text` on one line that no terminal obeys: control, format and other unprintable characters are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _unclosed(tokens: NDArray[Any], mask: LossMask, index: int, where: str) -> Iterator[Problem]:
    for number in sorted({*mask.alternating, *(a for a, b in zip(mask.pairs[::2], mask.pairs[1::2]) if a == b)}):
        count = int((tokens == number).sum())
        if count % 2:
            yield Problem(
                f"document {index} has {count} of token {number}, an odd number",
                where=where,
                why="loss masks alternate over a whole packed row: all later documents of the row would be inverted",
                level="warning",
            )


def _stretch(sp: Any, model: SpmModel, ids: Sequence[int], trained: bool) -> Stretch:
    return Stretch(trained, tuple(ids), tuple(model.pieces[number] for number in ids), _text(sp, model, ids))


def _text(sp: Any, model: SpmModel, ids: Sequence[int]) -> str:
    """Decoded text; control tokens appear as their pieces (sp.decode would drop them)."""
    out: list[str] = []
    run: list[int] = []
    for number in ids:
        if sp.is_control(number):
            out += [sp.decode(run) if run else "", model.pieces[number]]
            run = []
        else:
            run.append(number)
    return "".join([*out, sp.decode(run) if run else ""])
