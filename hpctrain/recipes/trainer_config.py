"""What the recipes of trainers with a YAML config share: the layers it is made from, and its
text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Callable

from hpctrain.config import text
from hpctrain.config.document import Document, Path, merge
from hpctrain.config.fields import Field
from hpctrain.config.run import RunSpec
from hpctrain.recipes.contract import Context
from hpctrain.recipes.datafiles import row_problems
from hpctrain.recipes.facts import Packages
from hpctrain.recipes.known_models import shape_by_name
from hpctrain.recipes.memory import Change, Layout, Shape, shape_of
from hpctrain.recipes.rules import Judge, Rule


def trainer_rules(
    spec: RunSpec, target: int | None, epochs: str, where: str, hint: str
) -> tuple[Rule, ...]:
    """What each trainer of hpctrain's own asks of a run: a folder for its checkpoints, and that a
    chain knows when it is done, which `epochs`, set at `where`, does not tell."""
    return (
        Rule(
            not spec.checkpoint_dir,
            "the trainer needs a folder for its checkpoints",
            spec.where("checkpoint"),
            hint="set `checkpoint: {dir: …}`",
        ),
        Rule(
            target is None and spec.num_links > 1,
            f"a chain of {spec.num_links} jobs must know when the run is done, and"
            f" `{epochs}` does not tell",
            where,
            hint=hint,
        ),
    )


def layered(context: Context, noted: Judge, what: str, *key: str) -> Document:
    """base_config under the run's config, with `data.train` at `key`, where `what` is named. Notes
    what contradicts."""
    spec = context.spec
    own = spec.document.section("config")
    layers = [context.recipe.document.section("config"), *context.read.get("base_config", ()), own]
    given: list[str] = list(spec.data.get("train") or [])
    if given:
        noted.check(
            Rule(
                own.get(*key) is not None,
                f"the {what} named twice",
                spec.where("data", "train"),
                why=f"`{'.'.join(key)}` at {own.where(*key)}",
                hint="delete one of them",
            ),
            Rule(
                len(given) > 1,
                f"`data.train` has {len(given)} entries",
                spec.where("data", "train", 1),
                hint="name the folder that holds the files",
            ),
        )
        noted.problems += row_problems(given[0], spec.where("data", "train", 0))
        places: dict[Path, Path] = {key[:depth]: ("data", "train") for depth in range(1, len(key))}
        places[key] = ("data", "train", 0)
        origins = {
            inner: spec.document.origins[place]
            for inner, place in places.items()
            if place in spec.document.origins
        }
        data: Any = given[0]
        for part in reversed(key):
            data = {part: data}
        layers.append(Document(data, origins, {}, spec.source))
    document = merge(layers)
    name = context.config.name or spec.source
    return Document(document.data, document.origins, document.key_origins, name)


def read_model(path: str) -> dict[str, Any]:
    """The config.json of a model's folder (or a config.json itself), {} where it cannot be read."""
    try:
        file = path if path.endswith(".json") else os.path.join(path, "config.json")
        with open(file, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def shape_at(path: str) -> Shape | None:
    """The shape of the model in a folder; by its name where it is on the hub, or does not lie here.
    None where neither tells."""
    return shape_of(read_model(path)) if os.path.exists(path) else shape_by_name(path)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that a model knows, its rope scaling included (transformers 5 calls
    that `rope_parameters`); None where its config does not say.

    Some count the stretch in `max_position_embeddings` and some do not, so the greater one holds.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    known = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    factor = rope.get("factor") or 1.0
    if not isinstance(known, int) or not isinstance(factor, (int, float)):
        return None
    original = rope.get("original_max_position_embeddings")
    return max(known, int((original if isinstance(original, int) else known) * factor))


def usual_changes(
    layout: Layout, batch_key: str, checkpointing: str, *more: Change
) -> list[Change]:
    """The smallest changes that every trainer knows, by its own keys ("" for what it does not); and
    others of its own."""
    found = []
    if checkpointing and not layout.checkpointing:
        found.append(Change(f"`{checkpointing}: true`", layout._replace(checkpointing=True)))
    if layout.tokens > layout.length:
        found.append(Change(f"`{batch_key}: 1`", layout._replace(tokens=layout.length)))
    return [*found, *more]


def extra_packages(
    context: Context,
    document: Document,
    wandb_project: str | None,
    attention: str,
    *section: str,
    others: Mapping[str, tuple[str, str]] | None = None,
) -> Packages:
    """What a config asks of the environment beside the recipe's own needs; the attention stands in
    its `section`."""
    wanted = dict(others or {})
    if wandb_project:
        wanted["wandb"] = (f"`wandb_project: {wandb_project}`", document.where("wandb_project"))
    if attention == "flash_attention_2":
        where = document.where(*section, "attention")
        wanted["flash-attn"] = ("`attention: flash_attention_2`", where)
    where_python = context.spec.where("recipe_options", "python")
    return Packages(str(context.options["python"]), where_python, wanted)


def config_text(
    module: str,
    name: str,
    fields: Mapping[str, Field],
    values: Mapping[str, Any],
    left_out: Callable[[str, Any], bool],
) -> str:
    """The config of run `name` as YAML for `python -m module`, every key with its sentence, so that
    the file explains itself.

    Keys without a value, and those that `left_out` says, are not written.
    """
    lines = text.comment(f"The training of run {name}, read by `python -m {module}` on every rank.")

    def add(fields: Mapping[str, Field], values: Mapping[str, Any], indent: int) -> None:
        for key, field in fields.items():
            if values[key] is None or left_out(key, values[key]):
                continue
            lines.extend(["", *text.comment(field.doc, indent)])
            if field.kind == "table":
                lines.append(f"{key}:")
                add(field.fields or {}, values[key], indent + 2)
            else:
                lines.extend(text.block(key, values[key], indent))

    add(fields, values, 0)
    return "\n".join(lines) + "\n"
