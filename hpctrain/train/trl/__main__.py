"""`python -m hpctrain.train.trl [--config config_sft.yaml]`, once per rank: under srun, torchrun,
or alone.

In a job the orders come from the environment (HPCTRAIN_*). With --config the run directory is the
current one, the checkpoint folder is `checkpoints` there, and a run goes on from its newest
complete checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings

from hpctrain.base import errors
from hpctrain.config.trainers.trl import HfSftConfig, load_config
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.core.program import Program, main
from hpctrain.train.core.source import HF_TRAINER


def start(config: HfSftConfig, launch: Launch, stop: StopRequest) -> int:
    """Import what trains, and train. Raises EnvironmentFault naming the extra for what is not
    installed."""
    # Nothing is ever fetched: what a run needs is named in its config.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    # What the libraries deprecate in each other is nothing that the reader of a job log can mend.
    warnings.filterwarnings(
        "ignore",
        category=FutureWarning,
        module=r"(torch|transformers|trl|peft|accelerate|datasets)\.",
    )
    try:
        if config.engine != "trl" and _has_gpu_and_unsloth(launch):
            import unsloth  # noqa: F401  # patches the others, so it must come first
        import accelerate  # noqa: F401
        import datasets
        import transformers
        from trl import SFTTrainer  # noqa: F401  # TRL imports its parts late

        from hpctrain.train.core import ranks
        from hpctrain.train.trl.trainer import train
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers", "trl", "datasets", "accelerate"):
            raise errors.missing_package(str(error.name), "hf") from error
        raise
    except (ImportError, RuntimeError) as error:  # what was built for other versions of the rest
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise errors.EnvironmentFault(
            f"the packages do not fit each other: {'; '.join(lines[:3])}",
            hint="`hpctrain doctor run.yaml` compares them with what the recipe needs",
        ) from error
    transformers.utils.logging.disable_progress_bar()  # a job log has no use for one
    datasets.disable_progress_bars()
    try:
        return train(config, launch, stop)
    finally:
        ranks.finish()


def _has_gpu_and_unsloth(launch: Launch) -> bool:
    import importlib.util

    import torch

    there = importlib.util.find_spec("unsloth") is not None
    return there and torch.cuda.is_available() and launch.num_ranks == 1


PROGRAM = Program(
    module="hpctrain.train.trl",
    doc=__doc__,
    example="config_sft.yaml",
    layout=HF_TRAINER.name,
    load=load_config,
    train=start,
    # SIGTERM is what `scancel` sends first.
    signals=lambda config: {config.stop_signal_number, int(signal.SIGTERM)},
    checkpoints=lambda config, folder: os.path.join(folder, "checkpoints"),
)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
