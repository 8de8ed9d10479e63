"""`python -m hpctrain.train.hf_sft [--config config_sft.yaml]`, once per rank: under srun, torchrun, or alone.

In a job the orders come from the environment (HPCTRAIN_*). With --config the run directory is the current one, the
checkpoint folder is `checkpoints` there, and a run goes on from its newest complete checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence

from hpctrain import errors, output
from hpctrain.train.hf_sft.config import HfSftConfig, load_config
from hpctrain.train.hf_sft.source import newest_complete
from hpctrain.train.launch import Launch, StopRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the environment or --config says; returns an exit code of `hpctrain.errors`."""
    parser = argparse.ArgumentParser(prog="python -m hpctrain.train.hf_sft", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", help="the YAML config, outside of a rendered job")
    given = parser.parse_args(arguments).config
    try:
        path = given or os.environ.get("HPCTRAIN_CONFIG") or ""
        if not path:
            raise errors.UsageError(
                "no config is given", hint="python -m hpctrain.train.hf_sft --config config_sft.yaml"
            )
        config = load_config(path)
        environment = standalone(given, os.environ, os.getcwd()) if given else os.environ
        launch = Launch.from_environment(environment)
        stop = StopRequest()
        # Before the slow imports: the signal may come during them. SIGTERM is what `scancel` sends first.
        for number in {config.stop_signal_number, int(signal.SIGTERM)}:
            stop.listen(number)
        return start(config, launch, stop)
    except errors.HpctrainError as error:
        if os.environ.get("RANK", "0") == "0":
            output.problems(error.problems)
        return error.exit_code


def start(config: HfSftConfig, launch: Launch, stop: StopRequest) -> int:
    """Import what trains, and train. Raises EnvironmentFault naming the extra for what is not installed."""
    # Nothing is ever fetched: what a run needs is named in its config.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    # What the libraries deprecate in each other is nothing that the reader of a job log can mend.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(torch|transformers|trl|peft|accelerate|datasets)\."
    )
    try:
        if config.engine != "trl" and _has_gpu_and_unsloth(launch):
            import unsloth  # noqa: F401  # patches the others, so it must come first
        import accelerate  # noqa: F401
        import datasets
        import transformers
        from trl import SFTTrainer  # noqa: F401  # TRL imports its parts late

        from hpctrain.train import ranks
        from hpctrain.train.hf_sft.trainer import train
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers", "trl", "datasets", "accelerate"):
            raise errors.missing_package(str(error.name), "hf") from error
        raise
    except (ImportError, RuntimeError) as error:  # what was built for other versions of the rest
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise errors.EnvironmentFault(f"the packages do not fit each other: {'; '.join(lines[:3])}",
                                      hint="`hpctrain doctor run.yaml` compares them with what the recipe needs") from error  # fmt: skip
    transformers.utils.logging.disable_progress_bar()  # a job log has no use for one
    datasets.disable_progress_bars()
    try:
        return train(config, launch, stop)
    finally:
        ranks.finish()


def standalone(path: str, environ: Mapping[str, str], folder: str) -> dict[str, str]:
    """The environment of a rendered job for a run that nobody rendered: it resumes where there is something to resume."""
    directory = os.path.join(folder, "checkpoints")
    found = newest_complete(directory)
    return {
        **environ,
        "HPCTRAIN_MODE": "resume" if found else "scratch",
        "HPCTRAIN_CONFIG": os.path.abspath(path),
        "HPCTRAIN_CHECKPOINT_DIR": directory,
        "HPCTRAIN_CHECKPOINT": found or "",
        "HPCTRAIN_RUN_DIR": folder,
    }


def _has_gpu_and_unsloth(launch: Launch) -> bool:
    import importlib.util

    import torch

    there = importlib.util.find_spec("unsloth") is not None
    return there and torch.cuda.is_available() and launch.num_ranks == 1


if __name__ == "__main__":
    sys.exit(main())
