"""What there is to say about recipes: which exist, and what each wants to know."""

from __future__ import annotations

import os
from typing import Any

from hpctrain.base.errors import HpctrainError
from hpctrain.config.recipe import list_recipes, load_recipe
from hpctrain.config.text import flow


def summaries() -> list[dict[str, str]]:
    """name, layer, title, path of every recipe; `problem` says why one does not load."""
    found = []
    for name, layer, folder in list_recipes():
        title = problem = ""
        try:
            title = load_recipe(name).title
        except HpctrainError as error:
            problem = error.problems[0].what
        found.append(
            {"name": name, "layer": layer, "title": title, "path": folder, "problem": problem}
        )
    return found


def describe(name: str) -> dict[str, Any]:
    """A recipe as plain data: its title, how it is started, the signal it saves on, and its
    options."""
    recipe = load_recipe(name)
    signal = recipe.values["signal"]
    options = []
    for option, field in recipe.options.items():
        declared = recipe.values["options"][option]
        shown = "" if field.default is None else flow(field.default)
        default = "required" if field.required else shown
        kind = f"list of {declared['items']}" if field.kind == "list" else field.kind
        options.append(
            {
                "name": option,
                "kind": " | ".join(field.choices) if field.choices else kind,
                "required": field.required,
                "default": field.default,
                "default_text": default,
                "choices": list(field.choices),
                "doc": field.doc,
                "where": recipe.document.where_key("options", option),
            }
        )
    return {
        "name": recipe.name,
        "title": recipe.title,
        "tasks": (
            {"per_gpu": "one per GPU", "per_node": "one per node, which starts the others"}.get(
                recipe.tasks, "as many as the run says"
            )
        ),
        "signal": (
            f"SIG{signal['name']}, {signal['lead_s']} s before the limit"
            if signal["name"]
            else "none"
        ),
        "proven": recipe.values["proven"],
        "path": os.path.join(recipe.folder, "recipe.yaml"),
        "config": recipe.values["config"],
        "options": options,
    }
