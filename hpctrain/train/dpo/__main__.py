"""`python -m hpctrain.train.dpo [--config config_dpo.yaml]`, once per rank: under srun, torchrun,
or alone.

    config + launch -> pairs, reference cache, model -> steps -> checkpoints, margins -> dpo_model

In a job the orders come from the environment (HPCTRAIN_*). With --config the run directory is the
current one, the checkpoint folder is `checkpoints` there (or in `mount_dir`), and a run goes on
from its newest complete checkpoint.
"""

from __future__ import annotations

import os
import sys
import warnings

from hpctrain.base import errors
from hpctrain.config.trainers.dpo import DpoConfig, load_config
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.core.program import Program, main


def train(config: DpoConfig, launch: Launch, stop: StopRequest) -> int:
    """Train to the end, or to the stop signal; both are exit code 0, with a checkpoint that
    `latest` names.

    Raises UsageError, Refused or EnvironmentFault for what the user can mend; nothing is saved
    then.
    """
    # Nothing is ever fetched: what a run needs is named in its config.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # What torch and transformers deprecate in each other is nothing that the reader of a job log
    # can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|transformers\.")
    try:
        import transformers

        from hpctrain.train.dpo.loop import DpoTrainer
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers", "accelerate"):
            raise errors.missing_package(str(error.name), "train") from error
        raise
    transformers.utils.logging.disable_progress_bar()  # a job log has no use for one
    trainer = DpoTrainer(config, launch)
    try:
        return trainer.run(stop)
    finally:
        trainer.close()


PROGRAM = Program(
    module="hpctrain.train.dpo",
    doc=__doc__,
    example="config_dpo.yaml",
    layout="dcp",
    load=load_config,
    train=train,
    signals=lambda config: (config.stop_signal_number,),
    checkpoints=lambda config, folder: os.path.join(config.mount_dir or folder, "checkpoints"),
)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
