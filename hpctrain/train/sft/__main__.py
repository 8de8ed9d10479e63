"""Supervised fine-tuning with DeepSpeed: `python -m hpctrain.train.sft`, once per rank, orders from
the environment.

    config + launch -> model, rows, engine -> steps -> checkpoints

Learning rate, data order and dropout are pure functions of the config and the iteration, so a
checkpoint holds nothing but weights, optimizer state and two counters, and a resumed run is the run
that was never interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings

from hpctrain.base import errors, terminal
from hpctrain.config.trainers.sft import SftConfig, load_config, resolve_batch
from hpctrain.train.core.checkpoint import CannotSave
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.sft.data import DataError


def main() -> int:
    """Train as the environment says; returns an exit code of `hpctrain.base.errors`."""
    try:
        launch = Launch.from_environment(os.environ)
        config = load_config(launch.config)
        stop = StopRequest()
        # before the slow imports: the signal may come during them
        stop.listen(config.stop_signal_number)
        return train(config, launch, stop)
    except errors.HpctrainError as error:
        if _speaks(error):
            terminal.problems(error.problems)
        return error.exit_code
    except OSError as error:
        terminal.problems(
            [errors.Problem(error.strerror or str(error), where=str(error.filename or ""))]
        )
        return errors.ENVIRONMENT


def train(config: SftConfig, launch: Launch, stop: StopRequest) -> int:
    """Train to the end, or to the stop signal; both are exit code 0, with a checkpoint that
    `latest` names.

    Raises UsageError, Refused or EnvironmentFault for what the user can mend; nothing is saved
    then.
    """
    # Nothing is ever fetched: what a run needs is named in its config.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # What DeepSpeed and torch deprecate in each other is nothing that the reader of a job log can
    # mend.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\."
    )
    try:
        from hpctrain.train.sft.loop import Trainer
    except ModuleNotFoundError as error:
        if error.name in ("torch", "deepspeed", "transformers"):
            raise errors.missing_package(str(error.name), "train") from error
        raise
    batch = resolve_batch(config, launch.num_ranks, launch.config)
    trainer = Trainer(config, launch, batch)
    try:
        return trainer.run(stop)
    finally:
        trainer.close()


def _speaks(error: errors.HpctrainError) -> bool:
    """Whether this rank should print an error: rank 0 what all ranks meet, one rank a node what may
    be the node's own."""
    if isinstance(error, (DataError, CannotSave)):
        return True
    if isinstance(error, errors.EnvironmentFault):
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
