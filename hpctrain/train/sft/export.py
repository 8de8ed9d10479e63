"""A checkpoint as a Hugging Face directory: weights, configs and a tokenizer that `transformers`
loads."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from hpctrain.base import terminal
from hpctrain.base.errors import HpctrainError, Refused, UsageError, need
from hpctrain.data.spm import load_model
from hpctrain.train.core.checkpoint import Progress, fitting, read_weights
from hpctrain.train.core.export import DTYPES, copy_tokenizer, publish_model, write_about
from hpctrain.train.core.hf_tokenizer import end_of_document, save_tokenizer
from hpctrain.train.core.source import Chat, Source


def export(
    source: Source, directory: str, precision: str = "auto", tokenizer: str | None = None
) -> list[str]:
    """Write a new Hugging Face directory; returns its file names. `precision` auto is the one it
    was trained in.

    All of it or nothing appears. Raises Refused when `directory` exists, UsageError when the source
    is one already or the weights do not fit its config, EnvironmentFault when it cannot be written.
    """
    check_target(source, directory)
    about = {
        "from": os.path.basename(source.path),
        "iteration": source.iteration,
        "precision": source.precision,
    }

    def fill(staged: str) -> None:
        model = load_hf_model(source, precision)
        _write_model(model, source.chat, tokenizer or source.tokenizer, about, staged)

    return publish_model(directory, fill)


def export_trained(directory: str, weights: dict[str, Any], progress: Progress) -> None:
    """Write the model that is being trained as a Hugging Face directory, with the tokenizer of its
    run; see `publish_model`.

    `weights` are all of them, by name, on the CPU.
    """
    import torch
    import transformers

    from hpctrain.train.sft.model import read_model_config

    config = progress.config
    about = {
        "from": f"global_step{progress.iteration}",
        "iteration": progress.iteration,
        "precision": progress.precision,
        "run_id": progress.run_id,
    }

    def fill(staged: str) -> None:
        model = transformers.AutoModelForCausalLM.from_config(read_model_config(config["model"]))
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model = model.to(getattr(torch, DTYPES[progress.precision])).eval()
        model.config.use_cache = True
        if not config["tokenizer"] and os.path.isdir(config["model"]):
            copy_tokenizer(config["model"], staged)
        _write_model(model, Chat.from_config(config), config["tokenizer"], about, staged)

    publish_model(directory, fill, progress.run_id)


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
    spm, chat = load_model(model), Chat.from_config(dict(config))
    shutil.copyfile(model, os.path.join(directory, "tokenizer.model"))
    try:
        save_tokenizer(spm, chat, directory, int(config["max_position_embeddings"]))
    except HpctrainError as error:
        terminal.info(
            "note: only tokenizer.model is exported, no Hugging Face tokenizer:"
            f" {error.problems[0].what}"
        )
    chat = replace(chat, eod=end_of_document(spm, chat))
    digits = re.search(r"\d+\Z", os.path.basename(checkpoint))
    about = {
        "from": os.path.basename(checkpoint),
        "iteration": int(digits[0]) if digits else None,
        "precision": {"bfloat16": "bf16", "fp16": "fp16"}.get(str(config.get("precision")), "fp32"),
        "chat": asdict(chat),
    }
    write_about(directory, about)


def load_hf_model(source: Source, precision: str = "auto") -> Any:
    """The plain `transformers` model of a checkpoint or an exported directory, in eval mode on the
    CPU."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DS_ACCELERATOR="cpu")
    # Whatever the libraries have to say while they load, stdout is for data.
    with contextlib.redirect_stdout(sys.stderr):
        return _load_hf_model(source, precision)


def _load_hf_model(source: Source, precision: str) -> Any:
    torch, transformers = need("torch", "train"), need("transformers", "train")
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
    model.load_state_dict(fitting(model.state_dict(), state, source.path))
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
        spm = load_model(tokenizer)
        check_vocabulary(spm.vocab_size, config.vocab_size, tokenizer)
        save_tokenizer(spm, chat, directory, int(config.max_position_embeddings))
        eod = end_of_document(spm, chat)
        ends += [eod] if eod is not None and eod not in ends else []
        chat = replace(chat, eod=eod)
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
    write_about(directory, {**about, "chat": asdict(chat)})
