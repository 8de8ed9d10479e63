"""The model and the data of a run: where each comes from, and what of it must be in the cache at
the site."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from hpctrain.recipes.contract import HubRepo
from hpctrain.recipes.open_instruct.arguments import as_number
from hpctrain.recipes.open_instruct.draft import SFT, Draft
from hpctrain.recipes.rules import Rule

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# Calls snapshot_download(model_name_or_path), which takes a path for a badly formed name:
# finetune.py since 45901fd (2026-04-07), so not at this commit.
_TAKES_A_FOLDER = ("7cc755f09322fb01eee73d87afc780a14b02ea43",)


@dataclass(frozen=True)
class Model:
    """The model to start from: `name` as the program gets it, `folder` where it lies when it is no
    hub model.

    `aliased`: the job shows the folder as a hub repository called `name`, since the program takes
    nothing else.
    """

    name: str
    folder: str | None
    aliased: bool
    where: str


def decide_model(draft: Draft) -> Model:
    """`checkpoint.start` (a folder with an exported model), else `recipe_options.model` (a folder,
    or a hub name)."""
    spec, options = draft.spec, draft.options
    folder, name, where = (
        spec.checkpoint_start,
        str(options["model"] or ""),
        draft.option_where("model"),
    )
    if folder:
        where = spec.where("checkpoint", "start")
        reason = "`checkpoint.start`" + (", instead of `recipe_options.model`" if name else "")
        draft.check(
            Rule(
                re.fullmatch(r"(step|epoch)_\d+", os.path.basename(folder)),
                f"`{os.path.basename(folder)}` holds the state of a training, not a model",
                where,
                why="open-instruct exports the model beside its step_N and epoch_N folders",
                hint=f"checkpoint: {{start: {os.path.dirname(folder)}}}",
            )
        )
    else:
        folder, reason = draft.local(name), "`recipe_options.model`"
    if not folder and not name:
        draft.error(
            "no model to start from",
            spec.document.where_key("recipe_options"),
            hint=(
                "recipe_options: {model: meta-llama/Llama-3.1-8B}, or checkpoint: {start:"
                " /a/folder}"
            ),
        )
        return Model("", None, False, where)
    if not folder:
        draft.check(
            Rule(
                not _HUB_ID.fullmatch(name) or "--" in name or ".." in name,
                f"`model: {name}` is no name on the Hugging Face hub",
                where,
                hint="a path begins with /, ./, ../ or ~",
            )
        )
        draft.decide("model", name, reason, where)
        return Model(name, None, False, where)
    draft.decide("model", folder, reason, where)
    aliased = draft.program == SFT and draft.commit not in _TAKES_A_FOLDER
    if not aliased:
        return Model(folder, folder, False, where)
    alias = "local/" + (
        re.sub(r"[^A-Za-z0-9._-]+|--+|\.\.+", "-", os.path.basename(folder)).strip("-._")[:90]
        or "model"
    )
    draft.decide(
        "model.alias",
        alias,
        "finetune.py asks the hub's library for its model, which takes no path: "
        "the job shows the folder as a repository of that name",
        where,
    )
    draft.check(
        Rule(
            not options["offline"],
            "a model in a folder needs `offline: true` with finetune.py",
            where,
            why="online, its library would look for it on the Hugging Face hub",
            hint="recipe_options: {offline: true}",
        )
    )
    return Model(alias, folder, True, where)


def decide_mixer(draft: Draft) -> list[str]:
    """The mixer list as the program gets it: names of data sets and local files, each with its
    part."""
    names, spec = draft.names, draft.spec
    for wrong in ("dataset_mixer", "dataset_name"):
        if draft.values.get(wrong) is not None:
            draft.error(
                f"`{wrong}` does not work on a command line",
                draft.document.where_key(wrong),
                why=(
                    f"`{names.mixer}` has a default that is not empty, and open-instruct refuses"
                    " two ways to name data"
                ),
                hint=f"config: {{{names.mixer}: [allenai/tulu-3-sft-mixture, 0.1]}}",
            )
            draft.values.pop(wrong)
    given = draft.values.get(names.mixer)
    files = list(spec.data.get("train") or ())
    draft.check(
        Rule(
            files and given,
            "the data are named twice",
            spec.where("data", "train"),
            why=f"`{names.mixer}` at {draft.where(names.mixer)}",
            hint="delete one of them",
        )
    )
    if not files and not given:
        draft.error(
            "no training data",
            spec.where("data"),
            hint=(
                f"data: {{train: [/path/to/file.jsonl]}}, or config: {{{names.mixer}: [name, 1.0]}}"
            ),
        )
        return []
    mixer: list[str] = []
    if files:
        for index, path in enumerate(files):
            mixer += [path, "1.0"]
            _check_file(draft, path, spec.where("data", "train", index))
    else:
        mixer = _check_mixer(draft, given)
    if mixer:
        draft.values[names.mixer] = mixer
    splits = draft.values.get(names.splits)
    if isinstance(splits, list) and len(splits) not in (1, len(mixer) // 2):
        draft.error(
            f"`{names.splits}` has {len(splits)} entries for {len(mixer) // 2} data sets",
            draft.where(names.splits),
            why="open-instruct takes one for all, or one for each",
        )
    return mixer


def _check_mixer(draft: Draft, given: Any) -> list[str]:
    names = draft.names
    if not isinstance(given, list) or len(given) % 2:
        draft.error(
            f"`{names.mixer}` must be pairs of a data set and its part",
            draft.document.where_key(names.mixer),
            hint="for example [allenai/tulu-3-sft-mixture, 0.1]",
        )
        return []
    mixer = []
    for index in range(0, len(given), 2):
        name, part = given[index], given[index + 1]
        number, where = as_number(part), draft.where(names.mixer, index + 1)
        if not isinstance(name, str) or as_number(name) is not None:
            draft.error(
                f"`{names.mixer}` must be pairs of a data set and its part",
                draft.where(names.mixer, index),
            )
            continue
        path = draft.local(name)
        if path:
            _check_file(draft, path, draft.where(names.mixer, index))
        elif not _HUB_ID.fullmatch(name):
            draft.error(
                f"`{name}` is no name on the Hugging Face hub",
                draft.where(names.mixer, index),
                hint="a path begins with /, ./, ../ or ~",
            )
        if number is None or number <= 0:
            draft.error(f"the part `{part}` of `{name}` is no number greater than 0", where)
            continue
        # open-instruct: with a point it is a share of the data, without one a number of samples.
        text = (
            str(part)
            if isinstance(part, str) and re.fullmatch(r"\d+|\d*\.\d+|\d+\.", part)
            else _plain(number, part)
        )
        draft.check(
            Rule(
                "." not in text and number <= 10,
                f"`{text}` means {text} samples of `{name}`, not all of it",
                where,
                level="warning",
                why="open-instruct reads a number without a point as a number of samples",
                hint=f"write {text}.0 for all",
            )
        )
        mixer += [path or name, text]
    return mixer


def _plain(number: float, part: Any) -> str:
    """A number without an exponent, with a point where it is a share."""
    if isinstance(part, int):
        return str(part)
    text = f"{number:.12f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def _check_file(draft: Draft, path: str, where: str) -> None:
    split = draft.values.get(draft.names.splits)
    draft.check(
        Rule(
            not path.endswith((".jsonl", ".parquet")),
            f"`{path}` is neither .jsonl nor .parquet",
            where,
            why="open-instruct takes any other name for a data set on the hub",
        ),
        Rule(
            isinstance(split, list) and any(name != "train" for name in split),
            f"a local file has only the split `train`, and `{draft.names.splits}` names another",
            where,
        ),
    )


def hub_repos(draft: Draft, model: Model, mixer: list[str], hf_home: str) -> tuple[HubRepo, ...]:
    """What must be in the cache below `hf_home` for a job that asks nobody: the model, its
    tokenizer, the data sets."""
    found = []
    revision = str(draft.get("model_revision") or "main")
    if model.name and not model.folder:
        found.append(HubRepo("model", "model", hf_home, model.name, revision, model.where))
    tokenizer = draft.values.get("tokenizer_name_or_path")
    if isinstance(tokenizer, str) and tokenizer != model.name and not draft.local(tokenizer):
        found.append(
            HubRepo(
                "tokenizer",
                "tokenizer",
                hf_home,
                tokenizer,
                str(draft.get("tokenizer_revision") or revision),
                draft.where("tokenizer_name_or_path"),
            )
        )
    for index in range(0, len(mixer), 2):
        if not draft.local(mixer[index]):
            found.append(
                HubRepo(
                    "data set",
                    "dataset",
                    hf_home,
                    mixer[index],
                    "main",
                    draft.where(draft.names.mixer, index),
                )
            )
    return tuple(found)
