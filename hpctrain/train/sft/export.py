"""A checkpoint as a Hugging Face directory: weights, configs and a tokenizer that `transformers`
loads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from hpctrain.base.errors import (
    EnvironmentFault,
    HpctrainError,
    Refused,
    UsageError,
    missing_package,
)
from hpctrain.base.files import open_to_readers, sync
from hpctrain.data.spm import load_model
from hpctrain.train.core.checkpoint import (
    META,
    Progress,
    describe_mismatch,
    read_meta,
    read_weights,
    remove_own,
    set_aside,
)
from hpctrain.train.core.source import Chat, Source

_TOKENIZER_FILES = (
    "token",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "generation_config",
)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export(
    source: Source, directory: str, precision: str = "auto", tokenizer: str | None = None
) -> list[str]:
    """Write a new Hugging Face directory; returns its file names. `precision` auto is the one it
    was trained in.

    All of it or nothing appears. Raises Refused when `directory` exists, UsageError when the source
    is one already or the weights do not fit its config, EnvironmentFault when it cannot be written.
    """
    check_target(source, directory)

    def fill(staged: str) -> None:
        about = {
            "from": os.path.basename(source.path),
            "iteration": source.iteration,
            "precision": source.precision,
        }
        _write_model(
            load_hf_model(source, precision),
            source.chat,
            tokenizer or source.tokenizer,
            about,
            staged,
        )

    try:
        return publish_model(directory, fill)
    except OSError as error:
        raise EnvironmentFault(f"cannot write `{directory}`: {error.strerror}") from error


def publish_model(directory: str, fill: Callable[[str], None], run_id: str = "") -> list[str]:
    """Let what `fill` writes into the folder it is given appear at `directory`, whole or not at
    all; returns the file names.

    What the run `run_id` wrote there before (its id is in hpctrain.json) is replaced, anything else
    of that name set aside. Raises OSError.
    """
    target = os.path.abspath(directory)
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    staged = tempfile.mkdtemp(prefix=f".{os.path.basename(target)[:60]}.", dir=parent)
    try:
        os.chmod(staged, 0o755)
        fill(staged)
        open_to_readers(staged)
        names = sorted(os.listdir(staged))
        for name in names:
            sync(os.path.join(staged, name))
        sync(staged)
        ours = (
            bool(run_id)
            and read_meta(target).get("run_id") == run_id
            and not os.path.islink(target)
        )
        aside = set_aside(target)
        os.rename(staged, target)
        sync(parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if ours and aside:
        remove_own(aside)
    return names


def is_export(directory: str, progress: Progress) -> bool:
    """Whether the model in `directory` is that of this very state of the run."""
    about = read_meta(directory)
    return (about.get("run_id"), about.get("iteration")) == (progress.run_id, progress.iteration)


def export_trained(directory: str, weights: dict[str, Any], progress: Progress) -> None:
    """Write the model that is being trained as a Hugging Face directory, with the tokenizer of its
    run; see `publish_model`.

    `weights` are all of them, by name, on the CPU. Raises EnvironmentFault when it cannot be
    written.
    """
    import torch
    import transformers

    from hpctrain.train.sft.model import read_model_config

    def fill(staged: str) -> None:
        model = transformers.AutoModelForCausalLM.from_config(read_model_config(config["model"]))
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model = model.to(getattr(torch, DTYPES[progress.precision])).eval()
        model.config.use_cache = True
        if not config["tokenizer"] and os.path.isdir(config["model"]):
            copy_tokenizer(config["model"], staged)
        about = {
            "from": f"global_step{progress.iteration}",
            "iteration": progress.iteration,
            "precision": progress.precision,
            "run_id": progress.run_id,
        }
        _write_model(model, Chat.from_config(config), config["tokenizer"], about, staged)

    config = progress.config
    try:
        publish_model(directory, fill, progress.run_id)
    except OSError as error:
        raise EnvironmentFault(f"cannot write `{directory}`: {error.strerror}") from error


def copy_tokenizer(model: str, directory: str) -> None:
    """Copy the files of a model directory that belong to its tokenizer."""
    for name in sorted(os.listdir(model)):
        path = os.path.join(model, name)
        if name.startswith(_TOKENIZER_FILES) and os.path.isfile(path):
            shutil.copyfile(path, os.path.join(directory, name))


def check_target(source: Source, directory: str) -> None:
    """Raises UsageError when the source is an exported directory, Refused when `directory`
    exists."""
    if source.exported:
        raise UsageError("this is a Hugging Face directory already", where=source.path)
    if os.path.lexists(os.path.abspath(directory)):  # an empty name means the current directory
        raise Refused(f"`{directory}` exists", hint="name a directory that does not")


def export_tokenizer(
    model: str, config: Mapping[str, Any], checkpoint: str, directory: str
) -> None:
    """Write the tokenizer files that belong beside weights which NeoX's converter makes of
    `checkpoint`, and hpctrain.json.

    `config` holds NeoX's keys. Where transformers is missing or cannot express the model, it is
    only copied, and said.
    """
    from hpctrain.base import terminal
    from hpctrain.train.core.hf_tokenizer import end_of_document, save_tokenizer

    spm, chat = load_model(model), Chat.from_config(dict(config))
    shutil.copyfile(model, os.path.join(directory, "tokenizer.model"))
    try:
        save_tokenizer(spm, chat, directory, int(config["max_position_embeddings"]))
    except HpctrainError as error:
        terminal.info(
            "note: only tokenizer.model is exported, no Hugging Face tokenizer:"
            f" {error.problems[0].what}"
        )
    except ImportError as error:
        terminal.info(
            f"note: only tokenizer.model is exported: {error.name} is missing, `pip install"
            " hpctrain[train]`"
        )
    chat = Chat(chat.user_open, chat.user_close, chat.assistant, end_of_document(spm, chat))
    digits = re.search(r"\d+\Z", os.path.basename(checkpoint))
    about = {
        "from": os.path.basename(checkpoint),
        "iteration": int(digits[0]) if digits else None,
        "precision": {"bfloat16": "bf16", "fp16": "fp16"}.get(str(config.get("precision")), "fp32"),
        "chat": asdict(chat),
    }
    with open(os.path.join(directory, META), "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)


def load_hf_model(source: Source, precision: str = "auto") -> Any:
    """The plain `transformers` model of a checkpoint or an exported directory, in eval mode on the
    CPU."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DS_ACCELERATOR="cpu")
    # Whatever the libraries have to say while they load, stdout is for data.
    with contextlib.redirect_stdout(sys.stderr):
        return _load_hf_model(source, precision)


def _load_hf_model(source: Source, precision: str) -> Any:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise missing_package(str(error.name), "train") from error
    from hpctrain.train.sft.model import read_model_config, read_pretrained

    # a checkpoint is read and written in files, few of them
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, DTYPES[source.precision if precision == "auto" else precision])
    config = read_model_config(source.path)
    config.use_cache = True
    if source.exported:
        return read_pretrained(source.path, dtype).eval()
    state = read_weights(source.path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    want, have = (
        {name: tuple(value.shape) for name, value in t.items()} for t in (model.state_dict(), state)
    )
    problems = describe_mismatch(source.path, want, have)
    if problems:
        raise UsageError(problems)
    model.load_state_dict({name: state[name] for name in want})
    return model.to(dtype).eval()


def check_vocabulary(pieces: int, embeddings: int, tokenizer: str) -> None:
    """Raises UsageError when the tokenizer can give a token that the model has no embedding for."""
    if pieces > embeddings:
        raise UsageError(
            f"the tokenizer has {pieces} pieces and the model {embeddings} embeddings",
            where=tokenizer,
            hint="name the tokenizer that the data was made with",
        )


def _write_model(
    model: Any, chat: Chat, tokenizer: str | None, about: dict[str, Any], directory: str
) -> None:
    """Weights, configs, the tokenizer of a SentencePiece model, and hpctrain.json with `about`,
    into an empty folder."""
    config = model.config
    ends = [token for token in (chat.assistant, chat.eod) if token is not None]
    if tokenizer:
        from hpctrain.train.core.hf_tokenizer import end_of_document, save_tokenizer

        spm = load_model(tokenizer)
        check_vocabulary(spm.vocab_size, config.vocab_size, tokenizer)
        save_tokenizer(spm, chat, directory, int(config.max_position_embeddings))
        eod = end_of_document(spm, chat)
        ends += [eod] if eod is not None and eod not in ends else []
        chat = type(chat)(chat.user_open, chat.user_close, chat.assistant, eod)
    config.architectures = [type(model).__name__]
    generation = model.generation_config
    generation.eos_token_id = ends or None
    generation.pad_token_id = ends[-1] if ends else None
    generation.bos_token_id = None
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        None,
        ends[-1] if ends else None,
        None,
    )
    model.save_pretrained(directory, safe_serialization=True)
    with open(os.path.join(directory, META), "w", encoding="utf-8") as file:
        json.dump({**about, "chat": asdict(chat)}, file, indent=1)
