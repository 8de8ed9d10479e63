"""Supervised fine-tuning with DeepSpeed: `python -m hpctrain.train.sft [--config config.yml]`, once
per rank.

    config + launch -> model, rows, engine -> steps -> checkpoints

Learning rate, data order and dropout are pure functions of the config and the iteration, so a
checkpoint holds nothing but weights, optimizer state and two counters, and a resumed run is the run
that was never interrupted. In a job the orders come from the environment (HPCTRAIN_*). With
--config the run directory is the current one and the checkpoint folder `checkpoints` there.
"""

from __future__ import annotations

import os
import sys
import warnings

from hpctrain.base import errors
from hpctrain.config.trainers.sft import SftConfig, load_config, resolve_batch
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.core.program import Program, main


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


PROGRAM = Program(
    module="hpctrain.train.sft",
    doc=__doc__,
    example="config.yml",
    layout="deepspeed",
    load=load_config,
    train=train,
    signals=lambda config: (config.stop_signal_number,),
    checkpoints=lambda config, folder: os.path.join(folder, "checkpoints"),
)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
