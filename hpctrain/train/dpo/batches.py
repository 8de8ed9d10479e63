"""Which pairs each step sees, and how a rank lays its share out in rows. Pure numpy; the same for
any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# batches that are sorted by length together: enough for even lengths, few enough to stay random
WINDOW = 64


@dataclass(frozen=True)
class Pair:
    """One prompt with two replies, as token ids (1-d int arrays)."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Slots:
    """What one rank computes in one forward pass: pairs by number, their places in the batch, and
    whether they count."""

    pairs: tuple[int, ...]
    places: tuple[int, ...]
    counts: tuple[bool, ...]


@dataclass(frozen=True)
class Rows:
    """A micro batch of B pairs as arrays. With `shared`, a row is prompt, chosen, rejected; else
    one reply a row.

    `input_ids`, `position_ids`, `segment` have shape (rows, length); segment is 0 prompt, 1 chosen,
    2 rejected, 3 padding. For each scored token, in order: `select` is the place in the flattened
    rows whose output predicts it, `labels` the token, `sequence` its reply (chosen 0…B-1, rejected
    B…2B-1), `offset` its place in that reply.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment: np.ndarray
    select: np.ndarray
    labels: np.ndarray
    sequence: np.ndarray
    offset: np.ndarray
    num_pairs: int
    longest: int
    shared: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.segment < 3).sum())


def steps_per_epoch(num_pairs: int, batch: int) -> int:
    """Optimizer steps of one pass; the last one may be smaller."""
    return -(-num_pairs // batch)


def plan_epoch(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch as arrays of pair numbers, each longest first; every pair once.

    Pairs are shuffled, sorted by length within a window, cut into batches, and the batches
    shuffled. The first batch of the first epoch is the longest one, so that memory which does not
    suffice shows at once.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), WINDOW * batch):
        window = order[start : start + WINDOW * batch]
        window = window[np.argsort(-lengths[window], kind="stable")]
        batches += [window[at : at + batch] for at in range(0, len(window), batch)]
    plan = [batches[number] for number in rng.permutation(len(batches))]
    if epoch == 0:
        longest = max(range(len(plan)), key=lambda number: int(lengths[plan[number]].sum()))
        plan[0], plan[longest] = plan[longest], plan[0]
    return plan


def rank_slots(pairs: np.ndarray, rank: int, num_ranks: int, micro: int) -> list[Slots]:
    """This rank's forward passes for a batch; all ranks have equally many.

    Ranks take neighbouring lengths in each pass, so that none waits for another. Slots that a small
    last batch leaves empty repeat its shortest pair and do not count.
    """
    out = []
    for start in range(
        rank * micro, -(-len(pairs) // (micro * num_ranks)) * micro * num_ranks, micro * num_ranks
    ):
        places = tuple(range(start, start + micro))
        counts = tuple(place < len(pairs) for place in places)
        if not any(counts):
            places, counts = places[:1], counts[:1]
        numbers = tuple(
            int(pairs[place]) if place < len(pairs) else int(pairs[-1]) for place in places
        )
        out.append(Slots(numbers, places, counts))
    return out


def lay_out(pairs: Sequence[Pair], shared: bool, multiple: int = 1) -> Rows:
    """The rows of a micro batch, padded on the right to the longest one, rounded up to `multiple`.

    Padding needs no mask: a causal model never looks to the right.
    """
    parts: list[list[tuple[int, np.ndarray]]] = []  # of each row: (segment, tokens)
    if shared:
        parts = [[(0, pair.prompt), (1, pair.chosen), (2, pair.rejected)] for pair in pairs]
    else:
        parts = [[(0, pair.prompt), (1, pair.chosen)] for pair in pairs]
        parts += [[(0, pair.prompt), (2, pair.rejected)] for pair in pairs]
    width = max(sum(len(tokens) for _, tokens in row) for row in parts)
    width = -(-width // multiple) * multiple
    shape = (len(parts), width)
    input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segment = np.full(shape, 3, np.int64)
    # chosen, rejected: arrays of (select, label, sequence, offset)
    scored: list[list[np.ndarray]] = [[], []]
    for row, row_parts in enumerate(parts):
        number, at = row % len(pairs), 0
        prompt = len(row_parts[0][1])
        for kind, tokens in row_parts:
            end = at + len(tokens)
            start = prompt if kind else 0
            input_ids[row, at:end], segment[row, at:end] = tokens, kind
            positions[row, at:end] = np.arange(start, start + len(tokens))
            if kind:
                # The first token of a reply is predicted by the prompt's last one; without a prompt
                # by nothing.
                skip = 0 if prompt else 1
                select = np.arange(at - 1, end - 1)
                select[:1] = prompt - 1
                scored[kind - 1].append(
                    np.stack(
                        [
                            row * width + select[skip:],
                            tokens[skip:],
                            np.full(len(tokens) - skip, number + (kind - 1) * len(pairs)),
                            np.arange(len(tokens) - skip),
                        ]
                    )
                )
            at = end
    flat = np.concatenate(scored[0] + scored[1], axis=1).astype(np.int64)
    longest = int(flat[3].max(initial=-1)) + 1
    return Rows(
        input_ids,
        positions,
        segment,
        flat[0],
        flat[1],
        flat[2],
        flat[3],
        len(pairs),
        longest,
        shared,
    )
