"""`python -m hpctrain.train.dpo [--config config_dpo.yaml]`, once per rank: under srun, torchrun, or alone.

    config + launch -> pairs, reference cache, model -> steps -> checkpoints, margins -> dpo_model

In a job the orders come from the environment (HPCTRAIN_*). With --config the run directory is the current one, the
checkpoint folder is `checkpoints` there (or in `mount_dir`), and a run goes on from its newest complete checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence

from hpctrain import errors, output
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.train.dpo.config import DpoConfig, load_config
from hpctrain.train.launch import Launch, StopRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the environment or --config says; returns an exit code of `hpctrain.errors`."""
    parser = argparse.ArgumentParser(prog="python -m hpctrain.train.dpo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", help="the YAML config, outside of a rendered job")
    given = parser.parse_args(arguments).config
    try:
        path = given or os.environ.get("HPCTRAIN_CONFIG") or ""
        if not path:
            raise errors.UsageError("no config is given", hint="python -m hpctrain.train.dpo --config config_dpo.yaml")
        config = load_config(path)
        environment = standalone(config, given, os.environ, os.getcwd()) if given else os.environ
        launch = Launch.from_environment(environment)
        stop = StopRequest()
        stop.listen(config.stop_signal_number)  # before the slow imports: the signal may come during them
        return train(config, launch, stop)
    except errors.HpctrainError as error:
        if os.environ.get("RANK", "0") == "0":
            output.problems(error.problems)
        return error.exit_code


def train(config: DpoConfig, launch: Launch, stop: StopRequest) -> int:
    """Train to the end, or to the stop signal; both are exit code 0, with a checkpoint that `latest` names.

    Raises UsageError, Refused or EnvironmentFault for what the user can mend; nothing is saved then.
    """
    # Nothing is ever fetched: what a run needs is named in its config.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # What torch and transformers deprecate in each other is nothing that the reader of a job log can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|transformers\.")
    try:
        import transformers

        from hpctrain.train.dpo.loop import DpoTrainer
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            raise errors.missing_package(str(error.name), "train") from error
        raise
    transformers.utils.logging.disable_progress_bar()  # a job log has no use for one
    trainer = DpoTrainer(config, launch)
    try:
        return trainer.run(stop)
    finally:
        trainer.close()


def standalone(config: DpoConfig, path: str, environ: Mapping[str, str], folder: str) -> dict[str, str]:
    """The environment of a rendered job for a run that nobody rendered: it resumes where there is something to resume."""
    directory = os.path.join(config.mount_dir or folder, "checkpoints")
    found = newest_complete(directory)
    return {
        **environ,
        "HPCTRAIN_MODE": "resume" if found else "scratch",
        "HPCTRAIN_CONFIG": os.path.abspath(path),
        "HPCTRAIN_CHECKPOINT_DIR": directory,
        "HPCTRAIN_CHECKPOINT": found or "",
        "HPCTRAIN_RUN_DIR": folder,
    }


def newest_complete(directory: str) -> str | None:
    """The checkpoint with the greatest number that is whole, by the rule that the chain's guard uses too."""
    layout = LAYOUTS["dcp"]
    names = os.listdir(directory) if os.path.isdir(directory) else []
    numbered = sorted(
        ((layout.number(name) or 0, name) for name in names if layout.number(name) is not None), reverse=True
    )
    for _, name in numbered:
        path = os.path.join(directory, name)
        try:
            if not layout.verdict(path, Listing(), Expected()).faults:
                return path
        except OSError:
            continue
    return None


if __name__ == "__main__":
    sys.exit(main())
