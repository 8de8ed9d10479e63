"""What a run says while it trains: GPT-NeoX's log line, metrics.jsonl, and Weights & Biases when
asked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault


@dataclass(frozen=True)
class Metrics:
    """One log interval over all ranks. `loss` is per trained token; the counts run since the link
    began."""

    iteration: int
    train_iters: int
    loss: float
    lr: float
    grad_norm: float
    step_time_s: float
    samples_per_s: float
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    trained_tokens: int
    consumed_samples: int
    epoch: float
    skipped: int
    nan: int


def log_line(metrics: Metrics) -> str:
    """The line that GPT-NeoX prints, so that whatever reads its logs reads ours."""
    m = metrics
    return (
        f" samples/sec: {m.samples_per_s:.3f} | iteration {m.iteration:8d}/{m.train_iters:8d} |"
        f" elapsed time per iteration (ms): {m.step_time_s * 1000:.1f} | learning rate: {m.lr:.3E}"
        f" | lm_loss: {m.loss:.6E} | grad norm: {m.grad_norm:.4f} | samples per second:"
        f" {m.samples_per_s:.3f} | tokens per gpu per second (tgs): {m.tokens_per_s_per_gpu:.1f} |"
        f" TFLOPs: {m.tflops_per_gpu:.3f} | number of skipped iterations: {m.skipped:3d} | number"
        f" of nan iterations: {m.nan:3d} |"
    )


class JsonLines:
    """A file of one JSON object a line that only grows: after a resume, steps that were lost appear
    again, and the later line counts."""

    def __init__(self, path: str):
        file = open(path, "ab+")
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # a kill may have torn the last line
        file.close()
        self._file = open(path, "a", encoding="utf-8")

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write whole lines at once, so that a kill tears at most the last one. JSON has no NaN:
        what is not finite is null."""
        lines = [json.dumps({name: _finite(value) for name, value in r.items()}) for r in records]
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Prints each interval, appends it to `metrics.jsonl`, and mirrors it to W&B; rank 0 only."""

    def __init__(self, run_dir: str, link: int, wandb_project: str | None, config: dict[str, Any]):
        self._file = JsonLines(os.path.join(run_dir, "metrics.jsonl"))
        self._link = link
        self._wandb: Any = None
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise EnvironmentFault(
                    "this needs the Python package `wandb`, which is not installed",
                    where="`wandb_project`",
                    hint="pip install wandb, or delete the key",
                ) from error
            os.environ.setdefault("WANDB_MODE", "offline")
            run = os.path.basename(run_dir)
            # A link is a run of its own there: offline runs cannot be resumed. Their group is the
            # chain.
            self._wandb = wandb.init(
                project=wandb_project, dir=run_dir, config=config, group=run, name=f"{run}-{link}"
            )

    def write(self, metrics: Metrics, more: str = "") -> None:
        """Say one interval everywhere; `more` ends the printed line."""
        print(log_line(metrics) + more, flush=True)
        self._file.append({"link": self._link, **asdict(metrics)})
        if self._wandb is not None:
            self._wandb.log(asdict(metrics), step=metrics.iteration)

    def close(self) -> None:
        """Close the file, and end the run of W&B."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
