"""Reference log-probabilities, computed once and kept on disk: one forward pass a pair instead of
one each step.

    FOLDER/reference-<key>.npz    values (pairs, 2): chosen, rejected; NaN where not computed yet;
                                  and a hash of them

The key hashes the tokens, the reference's weights and the precision, so a cache can neither be
stale nor, after a change of either, be used by mistake. It grows while it is computed: a job that
ends in between loses a minute of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpctrain.base.files import sha256_of, write_whole
from hpctrain.train.core import ranks
from hpctrain.train.dpo.batches import lay_out, rank_slots
from hpctrain.train.dpo.model import to_tensors, weight_files
from hpctrain.train.dpo.pairs import Pairs

CHUNK = 32  # forward passes between two looks at the clock and the stop signal
SAVE_EVERY_S = 60.0


def weights_fingerprint(folder: str, rank: int, num_ranks: int) -> str:
    """A hash of every byte of a model's config and weights; the ranks share the reading."""
    files = weight_files(folder)
    mine = {}
    for path in files[rank::num_ranks]:
        mine[os.path.basename(path)] = sha256_of(path)
    everyone: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyone, mine)
    merged = {name: value for part in everyone for name, value in part.items()}
    return hashlib.sha256(json.dumps(merged, sort_keys=True).encode()).hexdigest()


def cache_key(pairs_fingerprint: str, weights: str, precision: str) -> str:
    """What reference log-probabilities depend on."""
    return hashlib.sha256(f"1 {pairs_fingerprint} {weights} {precision}".encode()).hexdigest()


class ReferenceCache:
    """The values of one key. `complete` when no pair is left; `damaged` says what was wrong with a
    file that was there."""

    def __init__(self, folder: str, key: str, num_pairs: int):
        self.path = os.path.join(folder, f"reference-{key[:16]}.npz")
        self.key = key
        self.values = np.full((num_pairs, 2), np.nan)
        self.damaged = ""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                values, about = stored["values"], json.loads(str(stored["about"]))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            self.damaged = str(error) or type(error).__name__
            return
        if (
            about.get("key") != key
            or values.shape != self.values.shape
            or about.get("sha256") != _hash(values)
        ):
            self.damaged = "its content is not what was written"
            return
        self.values = values

    @property
    def complete(self) -> bool:
        return not np.isnan(self.values).any()

    def save(self) -> None:
        """Replace the file on disk. Raises OSError when the disk refuses."""
        content = io.BytesIO()
        about = json.dumps({"key": self.key, "sha256": _hash(self.values)})
        np.savez(content, values=self.values, about=np.array(about))
        write_whole(self.path, content.getvalue())


def fill(
    cache: ReferenceCache,
    model: Any,
    pairs: Pairs,
    micro: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> bool:
    """Compute what is missing on all ranks together, saving on the way; False when stopped before
    the end.

    Leaves the model gathered, as any forward pass does: see `parallel.reshard`.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    missing = np.flatnonzero(np.isnan(cache.values).any(axis=1))
    missing = missing[np.argsort(-pairs.lengths[missing], kind="stable")]
    per_chunk = CHUNK * micro * num_ranks
    say(f"Caching reference logprobs of {len(missing):,} pairs in {cache.path}")
    began = saved = time.monotonic()
    for start in range(0, len(missing), per_chunk):
        numbers = missing[start : start + per_chunk]
        table = torch.zeros((len(numbers), 2), dtype=torch.float64, device=device)
        with torch.no_grad():
            for slots in rank_slots(numbers, rank, num_ranks, micro):
                rows = lay_out([pairs[number] for number in slots.pairs], shared)
                logps = model(**to_tensors(rows, dtype, device))
                for at, (place, counts) in enumerate(zip(slots.places, slots.counts)):
                    if counts:
                        table[place, 0], table[place, 1] = logps[at], logps[rows.num_pairs + at]
        cache.values[numbers] = ranks.sum_over_ranks(table).cpu().numpy()
        last = start + per_chunk >= len(missing)
        due = last or (rank == 0 and time.monotonic() - saved > SAVE_EVERY_S)
        votes = torch.tensor([int(due), int(stop())], device=device)
        due_anywhere, stopping = (int(vote) > 0 for vote in ranks.sum_over_ranks(votes).tolist())
        if rank == 0 and (due_anywhere or stopping):
            cache.save()
            saved = time.monotonic()
            speed = (start + len(numbers)) / (saved - began)
            say(
                f"Caching reference logprobs: {start + len(numbers):,} of {len(missing):,} pairs,"
                f" {speed:.1f} pairs/s"
            )
        if stopping and not last:
            return False
    ranks.barrier()
    return True


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
