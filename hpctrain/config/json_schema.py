"""JSON Schemas of run.yaml, pipeline.yaml and site profiles, so that editors complete and check
them while one types.

Made from the same declared fields that hpctrain checks with, plus the options of the shipped
recipes. The files under `hpctrain/config/schemas/` are these, written out; a test holds them equal.
"""

from __future__ import annotations

import json
import os
from typing import Any

from hpctrain.base.paths import shipped_dir
from hpctrain.config import pipeline, run, site
from hpctrain.config.fields import json_schema
from hpctrain.config.recipe import list_recipes, load_recipe

KINDS = ("run", "pipeline", "site")
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "schemas")


def schema_text(kind: str, shipped_only: bool = False) -> str:
    """The schema of `run`, `pipeline` or `site` as JSON text; that of runs knows the options of
    every recipe there is."""
    if kind == "pipeline":
        schema = json_schema(
            pipeline.FIELDS, "hpctrain pipeline.yaml", "Runs that hand checkpoints or models on."
        )
    else:
        schema = _run_schema(shipped_only) if kind == "run" else _site_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _run_schema(shipped_only: bool) -> dict[str, Any]:
    schema = json_schema(
        run.FIELDS, "hpctrain run.yaml", "One training run: what trains, where, and how long."
    )
    # These may also come from the user's config or the site's defaults.
    schema["required"] = ["name", "recipe"]
    choices = []
    for name, _, folder in sorted(list_recipes()):
        if shipped_only and os.path.dirname(folder) != shipped_dir("templates"):
            continue
        recipe = load_recipe(name)
        options = json_schema(recipe.options, recipe.title)
        options.pop("$schema")
        required = options.get("required", [])
        choices.append(
            {
                "if": {"properties": {"recipe": {"const": name}}, "required": ["recipe"]},
                "then": {
                    "properties": {"recipe_options": options},
                    **({"required": ["recipe_options"]} if required else {}),
                },
            }
        )
    schema["allOf"] = choices
    return schema


def _site_schema() -> dict[str, Any]:
    full = json_schema(
        site.FIELDS, "hpctrain site profile", "What hpctrain knows about one machine, as data."
    )
    head = {key: full.pop(key) for key in ("$schema", "title", "description")}
    # A profile with `extends` is laid over another one, so that nothing but its name is required of
    # it.
    partial = {**_without_required(full), "required": ["name"]}
    return {
        **head,
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/overlay"},
        "else": {"$ref": "#/$defs/profile"},
        "$defs": {"profile": full, "overlay": partial},
    }


def _without_required(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _without_required(value)
            for key, value in node.items()
            if key != "required" or not isinstance(value, list)
        }
    return [_without_required(item) for item in node] if isinstance(node, list) else node
