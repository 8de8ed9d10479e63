"""What every pair did in every step: losses and rewards gathered once per log interval, and the
margin files.

logs/margins/margins_log.jsonl          one line a batch: epoch, step, mean, spread, quantiles
logs/margins/epoch_000/step_00010.npy   all margins since the file before, batch after batch
"""

from __future__ import annotations

import io
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpctrain.base.files import write_whole
from hpctrain.train.core.logs import JsonLines


@dataclass(frozen=True)
class Batch:
    """One step over all ranks; arrays are by place in the batch."""

    epoch: int
    step: int
    losses: np.ndarray
    chosen_rewards: np.ndarray
    rejected_rewards: np.ndarray
    grad_norm: float
    lr: float

    @property
    def margins(self) -> np.ndarray:
        return np.asarray(self.chosen_rewards - self.rejected_rewards)


@dataclass(frozen=True)
class Interval:
    """The batches since the last log line, the seconds they took, and the tokens computed by all
    ranks."""

    batches: tuple[Batch, ...]
    seconds: float
    tokens: int
    memory_gib: tuple[float, ...]

    def mean(self, name: str) -> float:
        """The mean over all pairs of finite batches of `losses`, `chosen_rewards`,
        `rejected_rewards` or `margins`."""
        finite = [batch for batch in self.batches if math.isfinite(batch.losses.sum())]
        return (
            float(np.concatenate([getattr(batch, name) for batch in finite]).mean())
            if finite
            else math.nan
        )

    @property
    def accuracy(self) -> float:
        """The share of pairs whose chosen reply has the higher reward."""
        return float(np.concatenate([batch.margins > 0 for batch in self.batches]).mean())

    @property
    def num_nan(self) -> int:
        return sum(not math.isfinite(batch.losses.sum()) for batch in self.batches)


class Gatherer:
    """Keeps this rank's share of each step on the device; one sum over ranks when the interval is
    closed."""

    def __init__(self, batch_size: int, device: torch.device):
        self._batch_size, self._device = batch_size, device
        self._start()

    def _start(self) -> None:
        self._tables: list[torch.Tensor] = []
        self._about: list[tuple[int, int, int, float, float]] = []
        self._tokens = 0
        self._since = time.monotonic()

    def __len__(self) -> int:
        return len(self._about)

    def new_table(self) -> torch.Tensor:
        """(batch, 3) for this rank to fill at its places: loss, chosen reward, rejected reward."""
        return torch.zeros((self._batch_size, 3), dtype=torch.float64, device=self._device)

    def add(
        self,
        table: torch.Tensor,
        epoch: int,
        step: int,
        pairs: int,
        tokens: int,
        norm: float,
        lr: float,
    ) -> None:
        self._tables.append(table)
        self._about.append((epoch, step, pairs, norm, lr))
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        """Leave out time that went into a checkpoint."""
        self._since += seconds

    def close(self) -> Interval:
        """The interval over all ranks; every rank must call it."""
        world = dist.get_world_size()
        extra = torch.zeros(1 + world, dtype=torch.float64, device=self._device)
        extra[0], extra[1 + dist.get_rank()] = self._tokens, _peak_memory_gib(self._device)
        sizes = [table.numel() for table in self._tables]
        flat = torch.cat([extra, *(table.reshape(-1) for table in self._tables)])
        dist.all_reduce(flat)
        seconds = time.monotonic() - self._since
        values = flat.cpu().numpy()
        batches, at = [], 1 + world
        for size, (epoch, step, pairs, norm, lr) in zip(sizes, self._about):
            table = values[at : at + size].reshape(-1, 3)[:pairs]
            batches.append(Batch(epoch, step, table[:, 0], table[:, 1], table[:, 2], norm, lr))
            at += size
        answer = Interval(
            tuple(batches), seconds, int(values[0]), tuple(float(x) for x in values[1 : 1 + world])
        )
        self._start()
        return answer


class MarginLog:
    """Writes the margin files; rank 0 only. After a resume, steps that were lost appear again, and
    the later line counts."""

    def __init__(self, run_dir: str):
        self.folder = os.path.join(run_dir, "logs", "margins")
        os.makedirs(self.folder, exist_ok=True)
        self._file = JsonLines(os.path.join(self.folder, "margins_log.jsonl"))

    def write(self, interval: Interval) -> None:
        """One array file per epoch of the interval, then one line per batch that names its file and
        rows."""
        lines = []
        for epoch in sorted({batch.epoch for batch in interval.batches}):
            batches = [batch for batch in interval.batches if batch.epoch == epoch]
            name = f"epoch_{epoch:03d}/step_{batches[-1].step:05d}.npy"
            content = io.BytesIO()
            np.save(
                content, np.concatenate([batch.margins for batch in batches]).astype(np.float32)
            )
            write_whole(os.path.join(self.folder, name), content.getvalue())
            at = 0
            for batch in batches:
                rows = [at, at + len(batch.margins)]
                lines.append({**describe(batch), "file": name, "rows": rows})
                at = rows[1]
        self._file.append(*lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def describe(batch: Batch) -> dict[str, Any]:
    """The line of one batch, without its file."""
    margins = batch.margins
    with np.errstate(invalid="ignore"):
        low, middle, high = np.quantile(margins, [0.1, 0.5, 0.9])
        numbers = {
            "loss": batch.losses.mean(),
            "mean": margins.mean(),
            "std": margins.std(),
            "min": margins.min(),
            "p10": low,
            "median": middle,
            "p90": high,
            "max": margins.max(),
            "positive": (margins > 0).mean(),
            "rewards_chosen": batch.chosen_rewards.mean(),
            "rewards_rejected": batch.rejected_rewards.mean(),
        }
    plain = {name: float(value) for name, value in numbers.items()}
    return {"epoch": batch.epoch, "step": batch.step, "pairs": len(margins), **plain}


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
