"""The text of a new run.yaml: short, commented, and valid as it is, for any recipe at any site.

A comment `# like this` explains; a line `#key: value` is an example that is valid when its `#` is
deleted. What is written comes from the declared fields, the recipe's `init` and its options'
`example`, and the site's profile.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import HpctrainError, Problem, UsageError
from hpctrain.base.units import format_time
from hpctrain.config.document import Document
from hpctrain.config.fields import Field, check
from hpctrain.config.recipe import Recipe, load_recipe
from hpctrain.config.run import FIELDS
from hpctrain.config.site import NAME, Site, load_site
from hpctrain.config.text import block, comment

_DEFAULT_TIME_S = 3600
# Keys that are always written, in this order; the others follow when the recipe gives them, else as
# examples.
_WRITTEN = ("name", "site", "recipe", "account", "partition", "nodes", "time")
_EXAMPLES: dict[str, Any] = {
    "container": "{data}/containers/image.sif",
    "checkpoint": {"start": "{checkpoints}/base/global_step1000", "dir": "{checkpoints}/{name}"},
    "data": {"train": ["{data}/data/train_text_document"]},
    "chain": {"jobs": 1, "give_up_after": 3},
    "preflight": True,
    "estimate": {"step_time_s": 2.5, "save_time_s": 60},
    "env": {"EXAMPLE": "1"},
    "sbatch": {"nice": 100},
    "secrets": "~/.config/hpctrain/secrets.env",
}


@dataclass(frozen=True)
class Place:
    """Where a new run lives: its name, who pays and who asks."""

    name: str
    account: str = ""
    user: str = ""


def new_run(
    folder: str,
    recipe_name: str,
    site_name: str,
    name: str | None = None,
    account: str | None = None,
) -> str:
    """The run.yaml of a new run in `folder`. Raises UsageError for names that do not exist or
    cannot be used."""
    problems: list[Problem] = []
    site = recipe = None
    try:
        site = load_site(site_name)
    except HpctrainError as error:
        problems += error.problems
    try:
        recipe = load_recipe(recipe_name)
    except HpctrainError as error:
        problems += error.problems
    place = Place(name or run_name(folder), account or "", getpass.getuser())
    for key, value in (("name", place.name), ("account", place.account)):
        _, wrong = check(Document({key: value}, name=f"--{key}"), {key: FIELDS[key]})
        problems += wrong if value else []
    pattern = site.values["account"]["pattern"] if site else ""
    if site and pattern and account and not re.fullmatch(pattern, account):
        problems.append(
            Problem(
                f"`{account}` is not an account of `{site.name}`",
                where="--account",
                why=f"set in {site.document.where('account', 'pattern')}",
            )
        )
    if problems or not site or not recipe:
        raise UsageError(problems)
    if os.sep in site_name or site_name.endswith((".yaml", ".yml")):
        # run.yaml names a profile relative to itself.
        site_name = os.path.relpath(os.path.expanduser(site_name), folder)
        site_name = site_name if os.sep in site_name else f"./{site_name}"
    return run_yaml_text(recipe, site, site_name, place)


def run_yaml_text(recipe: Recipe, site: Site, site_name: str, place: Place) -> str:
    """The run.yaml of a new run. Pure; `site_name` is what the file calls the site (a name, or a
    path to a profile)."""
    fill = _filler(site, place)
    given: dict[str, Any] = {
        "name": place.name,
        "site": site_name,
        "recipe": recipe.name,
        "nodes": 1,
        **fill(recipe.values["init"]),
    }
    given.setdefault("recipe_options", {})
    given.update(_where_it_runs(recipe, site, given))
    account = _account(site, place)
    if account:
        given["account"] = account
    lines = [
        f"# {recipe.title}, on {site.title}.",
        (
            "# A line `#key: value` is an example: delete its # to use it. `hpctrain check` finds"
            " every mistake at once;"
        ),
        "# `hpctrain plan` shows what is decided from this file, and why.",
        "",
    ]
    notes = _notes(recipe, site, place)
    for key in [*_WRITTEN, *(key for key in FIELDS if key not in _WRITTEN)]:
        field = FIELDS[key]
        if key == "recipe_options":
            lines += _options(recipe, given[key], fill)
        elif key in given:
            lines += _entry(key, field, given[key], notes.get(key, ""), fill)
        elif key in _EXAMPLES and not (
            key == "container" and site.values["container"]["runtime"] == "none"
        ):
            lines += _example(key, field, fill(_EXAMPLES[key]))
        elif key == "partition":
            names = ", ".join(site.partitions)
            lines += _example(
                key,
                field,
                _suiting(recipe, site) or "gpu",
                f"here: {names}" if names else "any name",
            )
    return "\n".join(lines).rstrip("\n") + "\n"


def run_name(folder: str) -> str:
    """A valid run name from a folder's: other characters become `-`. Raises UsageError when nothing
    is left."""
    base = os.path.basename(os.path.abspath(folder))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._")[:64]
    if not re.fullmatch(NAME, name, re.ASCII):
        raise UsageError(f"`{base}` gives no name for a run", hint="say one with --name")
    return name


def _filler(site: Site, place: Place) -> Any:
    """Fills {name}, {checkpoints}, {data} and {code} into every text of a value."""
    words = {
        "name": place.name,
        **{kind: _folder(site, kind, place) for kind in ("checkpoints", "data", "code")},
    }

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{(name|checkpoints|data|code)\}", lambda found: words[found[1]], value)
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    return fill


def _folder(site: Site, kind: str, place: Place) -> str:
    """The site's folder for a kind of data; beside run.yaml where the profile names none that is
    known from here."""
    for storage in site.values["storage"].values():
        if kind in storage["holds"]:
            path = storage["path"].replace("{account}", _account(site, place) or "{account}")
            path = path.replace("{user}", place.user or "{user}")
            if "{" not in path:
                return str(path)
    return "."


def _account(site: Site, place: Place) -> str:
    rules = site.values["account"]
    return place.account or rules["example"] or ("my_account" if rules["required"] else "")


def _where_it_runs(recipe: Recipe, site: Site, given: Mapping[str, Any]) -> dict[str, Any]:
    """A time within the limits, and a partition where none would be picked (a site whose partitions
    are all for tests)."""
    partitions = list(site.partitions.values())
    named = (
        partitions[0] if partitions and all(partition.debug for partition in partitions) else None
    )
    limits = [p.max_time_s or _DEFAULT_TIME_S for p in ([named] if named else partitions) if p]
    time_s = min(max(limits, default=_DEFAULT_TIME_S), _DEFAULT_TIME_S)
    return {
        "time": given.get("time", format_time(time_s)),
        **({"partition": named.name} if named else {}),
    }


def _suiting(recipe: Recipe, site: Site) -> str:
    """A partition that a small run of this recipe may name."""
    found = [
        p
        for p in site.partitions.values()
        if bool(p.node_type.gpus) == bool(recipe.values["needs_gpus"])
    ]
    found = [
        p for p in found or site.partitions.values() if not p.debug and (p.min_nodes or 1) == 1
    ]
    return max(found, key=lambda p: p.max_time_s or 10**9).name if found else ""


def _notes(recipe: Recipe, site: Site, place: Place) -> dict[str, str]:
    notes = {"recipe": f"`hpctrain recipe show {recipe.name}` lists its options"}
    if not place.account and _account(site, place):
        notes["account"] = "CHANGE THIS: it is only an example"
    return notes


def _options(recipe: Recipe, given: Mapping[str, Any], fill: Any) -> list[str]:
    """The recipe's options: required ones and those of `init` written, the rest as examples where
    one is known."""
    written, examples = [], []
    for name, field in recipe.options.items():
        doc = comment(
            field.doc + (f"; one of {', '.join(field.choices)}" if field.choices else ""), 2
        )
        example = fill(recipe.values["options"][name]["example"])
        example = field.default if example is None else example
        if name in given or field.required:
            value = given.get(name, example)
            written += [*doc, *block(name, _fallback(field, fill) if value is None else value, 2)]
        elif example is None:
            examples += comment(f"{name}: {field.doc}", 2)
        else:
            examples += [*doc, *("  #" + line for line in block(name, example, 0))]
    head = comment("what the recipe needs to know")
    if written:
        return [*head, "recipe_options:", *written, *examples, ""]
    # Nothing must be set: the key itself is part of the example, since a key with no value would be
    # null.
    return (
        [*head, "#recipe_options:", *(line.replace("  #", "#  ", 1) for line in examples), ""]
        if examples
        else []
    )


def _fallback(field: Field, fill: Any) -> Any:
    if field.choices:
        return field.choices[0]
    if field.kind == "path":
        return fill("{code}/change-me")
    value: Any = {"text": "change-me", "bool": False, "list": [], "map": {}, "time": "1:00:00"}.get(
        field.kind
    )
    return value if value is not None else int(field.minimum or 1)


def _entry(key: str, field: Field, value: Any, note: str, fill: Any) -> list[str]:
    lines = [*comment(field.doc + (f" ({note})" if note else "")), *block(key, value, 0)]
    if field.kind == "table" and isinstance(value, dict):
        missing = {
            name: fill(sub) for name, sub in _EXAMPLES.get(key, {}).items() if name not in value
        }
        for name, sub in missing.items():
            doc = (field.fields or {})[name].doc
            lines += [*comment(doc, 2), *("  #" + line for line in block(name, sub, 0))]
    return [*lines, ""]


def _example(key: str, field: Field, value: Any, note: str = "") -> list[str]:
    return [
        *comment(field.doc + (f" ({note})" if note else "")),
        *("#" + line for line in block(key, value, 0)),
        "",
    ]
