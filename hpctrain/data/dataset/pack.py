"""Simulates k-bin packing as training does it (`k_bin_packed` of the Tilde NeoX fork): what an
epoch is, and what is lost.

In training, rank 0 shuffles the documents, keeps k open bins of seq_length + 1 tokens, puts each
document into the fullest bin it fits (best fit), closes the fullest bin when none fits, and skips
documents longer than a bin with a warning only (megatron/data/gpt2_dataset.py).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.base.errors import UsageError


@dataclass(frozen=True)
class Packing:
    """One epoch, packed. `efficiency` is the share of tokens that are not padding; `samples` are
    rows of seq_length."""

    seq_length: int
    documents: int
    samples: int
    tokens: int
    efficiency: float
    skipped_documents: int
    skipped_tokens: int
    longest: int


@dataclass(frozen=True)
class Schedule:
    """`train_batch_size` = micro_batch * accumulation * data_parallel; `train_iters` covers
    `epochs` whole epochs."""

    train_batch_size: int
    samples_per_epoch: float
    iters_per_epoch: float
    train_iters: int


def pack(
    sizes: NDArray[Any], seq_length: int, bins: int = 16, seed: int = 1234, epochs: int = 1
) -> list[Packing]:
    """One Packing per epoch; each epoch is shuffled anew from one generator, and its bins are
    flushed at its end.

    Raises UsageError when no document fits: training would look for one for ever.
    """
    if seq_length < 1 or bins < 1 or epochs < 1:
        raise UsageError("sequence length, bins and epochs must be at least 1")
    capacity = seq_length + 1
    rng = np.random.RandomState(seed)
    order = np.arange(len(sizes), dtype=np.int32)
    lengths = np.asarray(sizes).astype(np.int64)
    fits = lengths <= capacity
    if not len(sizes):
        raise UsageError("the dataset is empty: there is nothing to pack")
    if not fits.any():
        raise UsageError(
            f"no document fits into {capacity} tokens",
            why="k_bin_packed would skip all of them and never end",
            hint="use a larger sequence length, or pack_impl packed",
        )
    too_long = ~fits
    out = []
    for _ in range(epochs):
        rng.shuffle(order)
        shuffled = lengths[order]
        samples = _simulate(shuffled[shuffled <= capacity].tolist(), capacity, bins)
        tokens = sum(samples)
        out.append(
            Packing(
                seq_length,
                len(sizes),
                len(samples),
                tokens,
                tokens / (len(samples) * capacity),
                int(too_long.sum()),
                int(lengths[too_long].sum()),
                int(lengths.max()),
            )
        )
    return out


def schedule(
    packings: Sequence[Packing], micro_batch: int, accumulation: int, data_parallel: int
) -> Schedule:
    """The iterations that `packings`, one an epoch, take in training."""
    if min(micro_batch, accumulation, data_parallel) < 1:
        raise UsageError("micro batch, accumulation and data parallel must be at least 1")
    batch = micro_batch * accumulation * data_parallel
    samples = sum(packing.samples for packing in packings)
    per_epoch = samples / len(packings)
    return Schedule(batch, per_epoch, per_epoch / batch, -(-samples // batch))


def _simulate(lengths: Sequence[int], capacity: int, bins: int) -> list[int]:
    """Tokens of each sample. Bins of equal fill are alike, so a sorted list of fills is all there
    is to know."""
    samples: list[int] = []
    used: list[int] = []
    for length in lengths:
        at = bisect_right(used, capacity - length) - 1
        if at >= 0:
            insort(used, used.pop(at) + length)
            continue
        if len(used) == bins:
            samples.append(used.pop())
        insort(used, length)
    # At the end of an epoch what is left is joined greedily, the fullest first.
    current = 0
    for fill in reversed(used):
        if current + fill >= capacity:
            if current:
                samples.append(current)
            current = 0
        current += fill
    if current:
        samples.append(current)
    return samples
