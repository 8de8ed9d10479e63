"""What a user may name to export or generate from: a run, a checkpoint folder, one checkpoint, or
an exported directory."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.runtime.settings import GuardError, Settings, read_settings
from hpctrain.train.core.checkpoint import META, Progress, read_meta, read_progress
from hpctrain.train.core.program import newest_complete


@dataclass(frozen=True)
class Chat:
    """The control tokens of a dialogue, as the run trained them: what opens and closes a user turn
    and a reply, and EOD.

    A turn is `user_open … user_close`, a reply `assistant … assistant`; None where the run had no
    such rule.
    """

    user_open: int | None = None
    user_close: int | None = None
    assistant: int | None = None
    eod: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Chat:
        """The tokens that the loss_mask rules of a run name."""
        pairs, alternating = (
            config.get("loss_mask_pairs") or [],
            config.get("loss_mask_alternating_individual") or [],
        )
        user_open, user_close = pairs[:2] if len(pairs) >= 2 else (None, None)
        return cls(
            user_open, user_close, alternating[0] if alternating else None, config.get("eod_id")
        )


@dataclass(frozen=True)
class Source:
    """Where weights lie: `path` of a checkpoint (`exported` false) or of a Hugging Face
    directory."""

    path: str
    exported: bool
    tokenizer: str | None
    chat: Chat
    precision: str
    iteration: int | None


def find_source(path: str) -> Source:
    """What `path` means.

    Raises UsageError when it holds nothing of this trainer, or a framework's checkpoint that has
    its own converter; EnvironmentFault when it does not exist.
    """
    if not os.path.isdir(path):
        raise EnvironmentFault("there is no such directory", where=path)
    settings = _settings_of(path)
    if settings is not None:
        folder = settings.checkpoint_dir
        if not folder or not os.path.isdir(folder):
            raise UsageError(f"the run's checkpoint folder `{folder}` is not there yet", where=path)
        return find_source(folder)
    latest = os.path.join(path, "latest")
    if os.path.isfile(latest):
        with open(latest, encoding="utf-8", errors="replace") as file:
            name = file.read().strip()
        if name in ("", ".", "..") or "/" in name or not os.path.isdir(os.path.join(path, name)):
            raise UsageError(
                f"`latest` names `{name}`, which is not there",
                where=path,
                hint="`hpctrain checkpoint list` shows what is; name a checkpoint itself",
            )
        return find_source(os.path.join(path, name))
    if glob.glob(os.path.join(glob.escape(path), "*.safetensors")):
        return _exported(path)
    progress = read_progress(path, Progress)
    if progress is None:
        raise UsageError(
            f"`{path}` is no run, checkpoint or exported model of the built-in trainer",
            why=f"it has neither plan.json, latest, *.safetensors nor {META}",
            hint=(
                "for GPT-NeoX name the run directory: `hpctrain export` then runs NeoX's own"
                " converter as a job"
            ),
        )
    return Source(
        path=os.path.abspath(path),
        exported=False,
        tokenizer=_tokenizer_of(path),
        chat=Chat.from_config(progress.config),
        precision=progress.precision,
        iteration=progress.iteration,
    )


def _exported(path: str) -> Source:
    about = read_meta(path)
    try:
        chat, precision = Chat(**about["chat"]), str(about["precision"])
    except (KeyError, TypeError):
        chat, precision = Chat(), "fp32"
    return Source(os.path.abspath(path), True, _tokenizer_of(path), chat, precision, None)


def _tokenizer_of(path: str) -> str | None:
    tokenizer = os.path.join(path, "tokenizer.model")
    return tokenizer if os.path.isfile(tokenizer) else None


def _settings_of(path: str) -> Settings | None:
    """What a run directory's plan says of its checkpoints, None for any other folder. Raises
    UsageError for a damaged plan."""
    if not os.path.isfile(os.path.join(path, "plan.json")):
        return None
    try:
        return read_settings(path)
    except GuardError as error:
        raise UsageError(f"cannot read the plan: {error}", where=path) from error


HF_TRAINER = LAYOUTS["hf-trainer"]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint-N of the Trainer; `path` is absolute."""

    path: str
    iteration: int


def find_checkpoint(path: str) -> Checkpoint | None:
    """The checkpoint that `path` means; None where it has nothing to do with transformers' Trainer.

    Raises UsageError when it has, and there is no whole one; EnvironmentFault when the folder
    cannot be read.
    """
    path = os.path.abspath(path)
    settings = _settings_of(path)
    if settings is not None:
        return (
            _newest(settings.checkpoint_dir or "") if settings.layout == HF_TRAINER.name else None
        )
    number = HF_TRAINER.number(os.path.basename(path))
    try:
        if number is not None and os.path.isfile(os.path.join(path, "trainer_state.json")):
            faults = HF_TRAINER.verdict(path, Listing(), Expected()).faults
            if faults:
                raise UsageError(
                    [Problem(f"the checkpoint is not whole: {one}", where=path) for one in faults]
                )
            return Checkpoint(path, number)
        if os.path.isdir(path) and any(
            HF_TRAINER.number(name) is not None for name in os.listdir(path)
        ):
            return _newest(path) if not os.path.isfile(os.path.join(path, "latest")) else None
    except OSError as error:
        raise EnvironmentFault(f"cannot read it: {error.strerror or error}", where=path) from error
    return None


def _newest(directory: str) -> Checkpoint:
    found = newest_complete(HF_TRAINER.name, directory)
    if found is None:
        raise UsageError(
            f"there is no whole checkpoint in `{directory}` yet",
            hint=f"`hpctrain checkpoint list {directory} --layout hf-trainer` shows what is there",
        )
    return Checkpoint(found, HF_TRAINER.number(os.path.basename(found)) or 0)
