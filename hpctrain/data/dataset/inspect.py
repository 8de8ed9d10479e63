"""A dataset for human eyes: text, pieces and ids, and which tokens the SFT loss masks leave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.base.errors import Problem, UsageError
from hpctrain.data.dataset.indexed_dataset import Dataset
from hpctrain.data.dataset.loss_mask import MaskRules, find_unclosed, trained_tokens
from hpctrain.data.encoders.reference import processor
from hpctrain.data.spm import SpmModel


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


def default_rules(control: dict[str, Any] | None, model: SpmModel) -> MaskRules:
    """What the fork's SFT.md recommends: user turns and the opening assistant token are not
    trained.

    `control` is that of the dataset's manifest; without it the model's own `<|user|>` and
    `<|assistant|>` are taken.
    """
    roles: dict[str, int] = {}
    if control:
        roles = {token["role"]: token["id"] for token in control["tokens"]}
    else:
        names = {piece: index for index, piece in enumerate(model.pieces)}
        roles = {
            role: names[f"<|{role}|>"] for role in ("user", "assistant") if f"<|{role}|>" in names
        }
    asked = [number for role, number in roles.items() if role != "assistant"]
    return MaskRules(
        pairs=tuple((number, number) for number in asked),
        alternating=(roles["assistant"],) if "assistant" in roles else (),
    )


def documents(
    dataset: Dataset, model: SpmModel, rules: MaskRules, first: int, count: int
) -> Iterator[Document]:
    """`count` documents from number `first`. Raises UsageError when an id is not in the model's
    vocabulary.

    Rules count from 0 in each document, which is what training does when every document closes what
    it opens; the others are named in `problems`.
    """
    sp = processor(model)
    for index in range(first, min(first + count, len(dataset))):
        tokens = np.asarray(dataset[index]).astype(np.int64)
        if len(tokens) and (int(tokens.max()) >= model.vocab_size or int(tokens.min()) < 0):
            raise UsageError(
                f"document {index} has id {int(tokens.max())}, but the model has {model.vocab_size}"
                " pieces",
                where=dataset.prefix,
                hint="is this the tokenizer that the dataset was made with?",
            )
        trained = trained_tokens(tokens, rules)
        changes = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
        stretches = tuple(
            _stretch(sp, model, tokens[begin:end].tolist(), bool(trained[begin]))
            for begin, end in zip(changes, changes[1:])
            if end > begin
        )
        problems = tuple(_unclosed(tokens, rules, index, dataset.prefix))
        yield Document(index, len(tokens), int(trained.sum()), stretches, problems)


def printable(text: str) -> str:
    """`text` on one line that no terminal obeys: control, format and other unprintable characters
    are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _unclosed(tokens: NDArray[Any], rules: MaskRules, index: int, where: str) -> Iterator[Problem]:
    for found in find_unclosed(tokens, rules):
        yield Problem(
            f"document {index} leaves {found.rule} open",
            where=where,
            why=(
                "training counts over a whole packed row: all later documents of the row would be"
                " inverted"
            ),
            level="warning",
        )


def _stretch(sp: Any, model: SpmModel, ids: Sequence[int], trained: bool) -> Stretch:
    return Stretch(
        trained, tuple(ids), tuple(model.pieces[number] for number in ids), _text(sp, model, ids)
    )


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
