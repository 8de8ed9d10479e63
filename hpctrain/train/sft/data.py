"""Indexed datasets as rows of whole documents: which row is trained when is a pure function of the
config and a counter.

Nothing is shuffled on the fly: sample `n` of a run is always the same row, so a resumed run needs
only the number of samples it has consumed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.trainers.sft import SftConfig
from hpctrain.data.dataset.indexed_dataset import Dataset, open_dataset
from hpctrain.data.dataset.loss_mask import find_unclosed, rules_from_config, trained_tokens
from hpctrain.train.sft._packing import pack_best_fit

Ints = npt.NDArray[np.int64]
_PIECE, _PIECES = 64 * 1024, 256  # bytes, and how many of a large file stand for all of it


class DataError(UsageError):
    """A document is wrong; only the rank that read it knows."""

    of_one_rank = True


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, as numpy arrays.

    `input_ids`, `position_ids` (restarting per document) and `document` (1, 2, … per row, 0 for
    padding) are (rows, seq_length). `trained` indexes the flattened (rows * seq_length) positions
    whose next token is trained and `labels` holds those tokens.
    """

    input_ids: Ints
    position_ids: Ints
    document: Ints
    trained: Ints
    labels: Ints


class PackedRows:
    """All rows of one epoch, and the endless stream of samples over them.

    Raises UsageError when a file is not an indexed dataset, when no document fits, or when
    `loss_mask_*` is wrong.
    """

    def __init__(self, config: SftConfig):
        self.seq_length = config.seq_length
        self.seed = config.seed
        self.rules = rules_from_config(
            config.loss_mask_pairs,
            config.loss_mask_alternating_individual,
            config.loss_mask_individual,
            config.eod_mask_loss,
            config.eod_id,
        )
        self._parts: list[Dataset] = [_open_whole(prefix) for prefix in config.train_data_paths]
        self._first = np.cumsum([0, *(len(part.sizes) for part in self._parts)])
        sizes = np.concatenate([part.sizes for part in self._parts]).astype(np.int64)
        capacity = config.seq_length + 1
        self.num_documents = len(sizes)
        self.too_long = np.flatnonzero(sizes > capacity)
        fits = np.flatnonzero((sizes > 0) & (sizes <= capacity))
        if not len(fits):
            raise UsageError(_nothing_fits(config, sizes))
        self.num_tokens = int(sizes[fits].sum())
        self.longest = int(sizes[fits].max())
        order = np.random.default_rng([config.seed, 0]).permutation(fits)
        if config.pack_impl == "unpacked":
            self._documents, self._row_bounds = order, np.arange(len(order) + 1)
        else:
            self._documents, self._row_bounds = pack_best_fit(order, sizes, capacity)
        self.sizes = sizes
        self._epoch = (-1, np.empty(0, dtype=np.int64))
        layout = hashlib.sha256(sizes.tobytes())
        layout.update(
            repr(
                (
                    config.seq_length,
                    config.seed,
                    config.pack_impl,
                    [len(p.sizes) for p in self._parts],
                )
            ).encode()
        )
        self.fingerprint = layout.hexdigest()

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._row_bounds) - 1

    @property
    def fill(self) -> float:
        """The share of all row positions that holds a token."""
        return self.num_tokens / (len(self) * (self.seq_length + 1))

    def name(self, document: int) -> str:
        """How messages call a document: `prefix#index`, counted within its file."""
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return f"{self._parts[part].prefix}#{document - self._first[part]}"

    def documents_of(self, sample: int) -> list[int]:
        """The documents in the row of sample `sample` (counted from 0, endless)."""
        row = self._row_of(sample)
        return [
            int(document)
            for document in self._documents[self._row_bounds[row] : self._row_bounds[row + 1]]
        ]

    def micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        """The rows of these samples. Every document is whole, and its first token is never a
        trained one."""
        shape = (len(samples), self.seq_length + 1)
        tokens, positions, document = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        trained = np.zeros(shape, dtype=bool)
        for index, sample in enumerate(samples):
            pieces = [self._read(number) for number in self.documents_of(sample)]
            lengths = np.array([len(piece) for piece in pieces])
            starts = np.cumsum(lengths) - lengths
            end = int(lengths.sum())
            tokens[index, :end] = np.concatenate(pieces)
            positions[index, :end] = np.arange(end) - np.repeat(starts, lengths)
            # No further than documents reach: positions beyond would change the angles of rotary
            # scaling that adapts.
            positions[index, end:] = np.arange(shape[1] - end) % self.longest
            document[index, :end] = np.repeat(np.arange(1, len(pieces) + 1), lengths)
            trained[index, :end] = trained_tokens(tokens[index, :end], self.rules, starts)
            # Nothing before it belongs to the same document, so there is nothing to predict it
            # from.
            trained[index, starts] = False
        flat = np.flatnonzero(trained[:, 1:])
        labels = tokens[:, 1:].reshape(-1)[flat]
        return MicroBatch(tokens[:, :-1], positions[:, :-1], document[:, :-1], flat, labels)

    def check_tokens(self, batch: MicroBatch, samples: Sequence[int], vocab_size: int) -> None:
        """Raise DataError naming the documents when a token is outside the model's vocabulary."""
        largest = max(int(batch.input_ids.max()), int(batch.labels.max(initial=0)))
        if largest < vocab_size:
            return
        bad = [
            number
            for sample in samples
            for number in self.documents_of(sample)
            if int(self._read(number).max()) >= vocab_size
        ]
        raise DataError(
            f"token {largest} in {', '.join(map(self.name, bad[:5]))} is outside the model's"
            " vocabulary",
            why=f"the model has {vocab_size} token embeddings, 0 to {vocab_size - 1}",
            hint="tokenize the data with the model's own tokenizer",
        )

    def look_through(self, limit: int = 2000) -> tuple[list[int], list[int]]:
        """Among the first `limit` documents in training order: those that leave a pair or an
        alternating token open, and those of which no token is trained. Raises UsageError when
        nothing at all is trained in them.
        """
        looked = self._documents[:limit]
        unclosed, silent = [], []
        for number in looked:
            tokens = self._read(number)
            if find_unclosed(tokens, self.rules):
                unclosed.append(int(number))
            if not trained_tokens(tokens, self.rules)[1:].any():
                silent.append(int(number))
        if len(silent) == len(looked):
            raise UsageError(
                "no token of the data is trained",
                where=", ".join(part.prefix for part in self._parts),
                why=(
                    f"{len(looked):,} documents hold nothing that the `loss_mask_*` rules leave,"
                    " such as a reply"
                ),
                hint="`hpctrain data inspect` shows which tokens are trained",
            )
        return unclosed, silent

    def content(self) -> str:
        """A hash of what the .bin files hold: of all of a small one, of 256 pieces of 64 KiB of a
        large one."""
        digest = hashlib.sha256()
        for part in self._parts:
            tokens, piece = part.tokens, _PIECE // part.tokens.dtype.itemsize
            count = min(-(-len(tokens) // piece), _PIECES)
            digest.update(f"{len(tokens)} ".encode())
            for start in (
                np.linspace(0, max(0, len(tokens) - piece), count).astype(np.int64).tolist()
            ):
                digest.update(tokens[start : start + piece].tobytes())
        return digest.hexdigest()

    def _row_of(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                np.random.default_rng([self.seed, 1, epoch]).permutation(len(self)),
            )
        return int(self._epoch[1][position])

    def _read(self, document: int) -> npt.NDArray[Any]:
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._parts[part][int(document - self._first[part])]


def step_samples(
    step_start: int, rank: int, num_ranks: int, micro: int, accumulation: int
) -> list[list[int]]:
    """The samples of each forward pass of one rank in the step whose first sample is
    `step_start`."""
    return [
        [step_start + (turn * num_ranks + rank) * micro + index for index in range(micro)]
        for turn in range(accumulation)
    ]


def describe_too_long(rows: PackedRows, limit: int = 10) -> str:
    """One line that counts and names the documents that no row can hold; empty when there are
    none."""
    if not len(rows.too_long):
        return ""
    named = [
        f"{rows.name(number)} ({rows.sizes[number]} tokens)" for number in rows.too_long[:limit]
    ]
    more = f", and {len(rows.too_long) - limit} more" if len(rows.too_long) > limit else ""
    return (
        f"{len(rows.too_long)} of {rows.num_documents} documents are longer than seq_length + 1 ="
        f" {rows.seq_length + 1} tokens and are never trained: {', '.join(named)}{more}"
    )


def _open_whole(prefix: str) -> Dataset:
    """The dataset, if its .bin holds all that its .idx promises; a copy that was cut off does
    not."""
    dataset = open_dataset(prefix)
    itemsize = dataset.tokens.dtype.itemsize
    needed = int((dataset.pointers // itemsize + dataset.sizes).max(initial=0))
    if needed > dataset.num_tokens:
        why = f"it holds {dataset.num_tokens} tokens, and its index reaches to {needed}"
        raise UsageError(f"`{prefix}.bin` is cut short", why=why, hint="copy or tokenize it again")
    return dataset


def _nothing_fits(config: SftConfig, sizes: Ints) -> Problem:
    paths = ", ".join(os.path.basename(prefix) for prefix in config.train_data_paths)
    if not len(sizes) or not sizes.max():
        return Problem(f"{paths} holds no tokens")
    return Problem(
        f"no document of {paths} fits into a row",
        why=(
            f"the shortest has {sizes[sizes > 0].min()} tokens, a row seq_length + 1 ="
            f" {config.seq_length + 1}"
        ),
        hint="raise `seq_length`",
    )
