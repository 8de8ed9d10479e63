"""The option `layout`: whose checkpoints a program writes, by name or described in run.yaml."""

from __future__ import annotations

from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.config.document import Document
from hpctrain.config.fields import Field, check
from hpctrain.recipes.contract import Context
from hpctrain.runtime.layouts import LAYOUTS

_NAME = r"[^/\x00]+"
FIELDS = {
    "pattern": Field(
        "text",
        "the name of a checkpoint (a folder, or a file); `{iteration}` is its number, `*` anything",
        required=True,
        pattern=r"[^/{}]*\{iteration\}[^/{}]*",
        shape="a name with `{iteration}` in it once",
    ),
    "marker": Field(
        "text", "a file whose presence makes one complete", pattern=_NAME, shape="a file's name"
    ),
    "files": Field(
        "list", "files that a complete one holds, whole", items=Field("text", "a path inside it")
    ),
    "tracker": Field(
        "text",
        "the file beside the checkpoints that names the one to resume from",
        pattern=_NAME,
        shape="a file's name",
    ),
    "tracker_holds": Field("text", "what it holds", default="name", choices=("name", "iteration")),
}


def read_layout(context: Context) -> tuple[str, dict[str, Any] | None, list[Problem]]:
    """The layout's name, the description of one of one's own (else None), and what is wrong."""
    path = ("recipe_options", "layout")
    given = context.options["layout"]
    if not isinstance(given, dict):
        if isinstance(given, str) and given in LAYOUTS:
            return given, None, []
        what = f"`recipe_options.layout: {given}` is neither a layout's name nor a description"
        # such a name was refused with the options
        known = given in LAYOUTS or isinstance(given, str)
        return "none", None, [] if known else [Problem(what, context.spec.where(*path))]
    document = context.spec.document
    if document.get(*path) is None:  # a recipe's own default
        document = Document({path[0]: {path[1]: given}}, name=f"recipe {context.recipe.name}")
    rule, problems = check(document, FIELDS, path)
    if problems:
        return "none", None, list(problems)
    return "own", {key: value for key, value in rule.items() if value}, []
