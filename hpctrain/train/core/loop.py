"""The loop of the built-in trainers over the steps of one link: step, log, save, export, stop.

A trainer says what a step, a report, a checkpoint and an exported model are; when each is due, and
what ends the link, is decided here, the same on every rank.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.base import errors
from hpctrain.train.core import checkpoint, ranks
from hpctrain.train.core.export import is_export
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.core.logs import MetricsLog


@dataclass(frozen=True)
class Cadence:
    """How many steps lie between two log lines and two checkpoints, and how many in a row may be
    without a finite gradient. `keep`: this run's newest checkpoints that stay, None for all."""

    log: int
    save: int
    keep: int | None
    max_skipped: int
    stop_signal: str


class StepLoop:
    """One rank of one link. A trainer sets `num_steps`, `progress` (a frozen record of this run
    with run_id, iteration, consumed_samples and config), `interval` (what happened since the last
    report; `exclude(seconds)` leaves time out) and `export_to`, and fills in the methods that raise
    NotImplementedError; all ranks call each of them together."""

    num_steps: int
    progress: Any
    interval: Any
    export_to: str | None = None
    tag: re.Pattern[str] = checkpoint.TAG  # the names of its checkpoints

    def __init__(self, launch: Launch, cadence: Cadence, wandb_project: str | None):
        self.launch, self.cadence, self.wandb_project = launch, cadence, wandb_project
        self.log: MetricsLog | None = None

    def begin_step(self, stopping: bool) -> bool:
        """Get ready for the next step; whether any rank wants to stop instead."""
        raise NotImplementedError

    def step(self, number: int) -> bool:
        """Train step `number` and count it in `progress`; whether it was skipped for want of a
        finite gradient."""
        raise NotImplementedError

    def report(self) -> None:
        """Log the steps since the last report."""
        raise NotImplementedError

    def before_save(self) -> None:
        """What must be on the disk before a checkpoint is."""

    def write_checkpoint(self) -> str:
        """Write the checkpoint of this step; its path."""
        raise NotImplementedError

    def all_weights(self) -> dict[str, Any]:
        """All weights by name on the CPU of rank 0; empty on the others."""
        raise NotImplementedError

    def write_model(self, target: str, weights: dict[str, Any]) -> None:
        """On rank 0: write `weights` as the Hugging Face directory `target`."""
        raise NotImplementedError

    def run_steps(self, stop: StopRequest) -> int:
        """Step to the last one, saving on the way; returns the exit code.

        0 at the end or after a save on the stop signal, 1 when the gradient stays not finite
        (nothing is saved then, so the last good checkpoint stays the last).
        """
        first = self.progress.iteration + 1
        if first > self.num_steps:
            self.export()
            self.say(f"nothing to train: {self._place()} is done")
            return errors.DONE
        self.open_logs()
        saved, skipped_in_a_row, stop_file = self.progress.iteration, 0, False
        for number in range(first, self.num_steps + 1):
            if self.begin_step(stop.received or stop_file):
                if saved != self.progress.iteration:
                    self.save()
                self._say_stopped(stop_file, anything_new=number > first)
                return errors.DONE
            skipped_in_a_row = skipped_in_a_row + 1 if self.step(number) else 0
            last = number == self.num_steps
            hopeless = skipped_in_a_row >= self.cadence.max_skipped or (
                last and skipped_in_a_row == number
            )
            if last or hopeless or number == first or number % self.cadence.log == 0:
                self.report()
            if hopeless:
                self.say(
                    f"error: no finite gradient for {skipped_in_a_row} steps in a row; nothing is"
                    " saved, exit 1"
                )
                return errors.NO
            if last:
                # Before the checkpoint that says the run is done: once that exists, no later link
                # would export.
                self.export()
            if last or number % self.cadence.save == 0:
                self.save()
                saved = number
                stop_file = self.launch.rank == 0 and os.path.exists(
                    os.path.join(self.launch.run_dir, "STOP")
                )
        self.say(f"done: {self._place()}, exit 0")
        return errors.DONE

    def say(self, text: str) -> None:
        """A line on rank 0's stdout."""
        if self.launch.rank == 0:
            print(f"hpctrain: {text}", flush=True)

    def open_logs(self) -> None:
        """Begin to log, once every folder that the link writes to is known to be writable."""
        folders = [self.launch.checkpoint_dir, self.launch.run_dir]
        folders += [os.path.dirname(self.export_to)] if self.export_to else []
        ranks.on_first(self.launch.rank, lambda: list(map(checkpoint.check_writable, folders)))
        if self.launch.rank == 0:
            self.log = MetricsLog(
                self.launch.run_dir, self.launch.link, self.wandb_project, self.progress.config
            )

    def go_on_from(self, then: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Take over where a checkpoint's progress `then` stood; say what changed from the config
        `old` to `new`."""
        self.progress = dataclasses.replace(
            self.progress,
            run_id=then.run_id,
            iteration=then.iteration,
            consumed_samples=then.consumed_samples,
        )
        for change in checkpoint.changed_keys(old, new):
            self.say(f"note: changed since the checkpoint: {change}")

    def save(self) -> None:
        """Write the checkpoint of this step on all ranks, and delete this run's oldest ones."""
        self.before_save()
        start_s = time.monotonic()
        path = self.write_checkpoint()
        took_s = time.monotonic() - start_s
        self.say(f"saved {path} in {took_s:.1f} s")
        keep = self.cadence.keep
        if keep and self.launch.rank == 0:
            directory, run_id = self.launch.checkpoint_dir, self.progress.run_id
            for old in checkpoint.prune(directory, run_id, keep, self.tag):
                self.say(f"deleted {old} (keep_last_n_checkpoints {keep})")
        self.interval.exclude(took_s)

    def export(self) -> None:
        """The trained model at `export_to`, if there is to be one and this very state is not
        there."""
        target, rank = self.export_to, self.launch.rank
        if target is None or ranks.on_first(rank, lambda: is_export(target, self.progress)):
            return
        weights = self.all_weights()
        ranks.on_first(rank, lambda: self.write_model(target, weights))
        self.say(f"wrote {target}")

    def _place(self) -> str:
        return f"iteration {self.progress.iteration} of {self.num_steps}"

    def _say_stopped(self, stop_file: bool, anything_new: bool) -> None:
        why = "the stop file" if stop_file else f"signal {self.cadence.stop_signal}"
        kept = "saved" if anything_new else "nothing new to save"
        self.say(f"stopped by {why}: {kept} at {self._place()}, exit 0")
