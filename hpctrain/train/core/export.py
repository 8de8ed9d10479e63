"""What all trainers do to leave a model as a Hugging Face directory: whole or not at all, with the
tokenizer it was trained with."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.files import open_to_readers, sync
from hpctrain.train.core.checkpoint import META, read_meta, remove_own, set_aside

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# How the names of a tokenizer's files begin, in the directories of all its kinds.
_TOKENIZER_FILES = (
    "token",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
)


def publish_model(directory: str, fill: Callable[[str], None], run_id: str = "") -> list[str]:
    """Let what `fill` writes into the folder it is given appear at `directory`, whole or not at
    all; returns the file names.

    What the run `run_id` wrote there before (its id is in hpctrain.json) is replaced, anything else
    of that name set aside. Raises EnvironmentFault when it cannot be written.
    """
    target = os.path.abspath(directory)
    parent = os.path.dirname(target)
    staged = ""
    try:
        os.makedirs(parent, exist_ok=True)
        staged = tempfile.mkdtemp(prefix=f".{os.path.basename(target)[:60]}.", dir=parent)
        os.chmod(staged, 0o755)
        fill(staged)
        open_to_readers(staged)
        names = sorted(os.listdir(staged))
        for name in [*names, "."]:
            sync(os.path.join(staged, name))
        known = "" if os.path.islink(target) else read_meta(target).get("run_id")
        aside = set_aside(target)
        os.rename(staged, target)
        sync(parent)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, OSError):
            words = f"cannot write `{directory}`: {error.strerror or error}"
            raise EnvironmentFault(words) from error
        raise
    if aside and run_id and known == run_id:
        remove_own(aside)
    return names


def is_export(directory: str, progress: Any) -> bool:
    """Whether the model in `directory` is that of this very state of the run."""
    about = read_meta(directory)
    return (about.get("run_id"), about.get("iteration")) == (progress.run_id, progress.iteration)


def write_about(directory: str, about: Mapping[str, Any]) -> None:
    """Write hpctrain.json, which tells where a model came from."""
    with open(os.path.join(directory, META), "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)


def tokenizer_files(folder: str) -> list[str]:
    """The names of the files of a model directory that its tokenizer is made of."""
    names = [name for name in sorted(os.listdir(folder)) if name.startswith(_TOKENIZER_FILES)]
    return [name for name in names if os.path.isfile(os.path.join(folder, name))]


def copy_tokenizer(model: str, directory: str) -> None:
    """Copy the files of a model directory that belong to its tokenizer, and how it is to
    generate."""
    for name in [*tokenizer_files(model), "generation_config.json"]:
        if os.path.isfile(os.path.join(model, name)):
            shutil.copyfile(os.path.join(model, name), os.path.join(directory, name))
