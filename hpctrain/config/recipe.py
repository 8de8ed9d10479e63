"""A recipe's declaration: the data of `templates/<recipe>/recipe.yaml`; its rules are in
`hpctrain/recipes/<module>.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.paths import layer_dirs
from hpctrain.config.document import Document, load_yaml
from hpctrain.config.fields import Field, check, nearest
from hpctrain.config.site import ENV_NAME, NAME

MODES = ("scratch", "finetune", "resume")

_OPTION = {
    "kind": Field(
        "text",
        "type",
        required=True,
        choices=("text", "path", "int", "number", "bool", "time", "list", "map", "any"),
    ),
    "doc": Field("text", "what it means", required=True),
    "required": Field("bool", "must be given", default=False),
    "default": Field("any", "value when absent", nullable=True),
    "choices": Field("list", "allowed values", items=Field("text", "")),
    "items": Field(
        "text",
        "type of a list's items",
        default="text",
        choices=("text", "path", "int", "number", "any"),
    ),
    "minimum": Field("number", "least value"),
    "maximum": Field("number", "greatest value"),
    "reads": Field("text", "hpctrain reads the file (or files) as this", choices=("yaml",)),
    "at_site": Field("bool", "a path on the cluster that the job needs", default=False),
    "example": Field("any", "a valid value, which `hpctrain init` shows", nullable=True),
}

FIELDS: dict[str, Field] = {
    "name": Field(
        "text",
        "the recipe's name, equal to its folder's",
        required=True,
        pattern=NAME,
        shape="a name",
    ),
    "title": Field("text", "one line on what it trains with", required=True),
    "module": Field(
        "text", "module under hpctrain.recipes", required=True, pattern="[a-z_]+", shape="a module"
    ),
    "tasks": Field(
        "text",
        "one task per GPU, or one per node that starts the others; by_launch: free where the option"
        " `launch` says srun, else per_node",
        default="per_gpu",
        choices=("per_gpu", "per_node", "free", "by_launch"),
    ),
    "layout": Field("text", "checkpoint layout", default="none"),
    "needs_gpus": Field("bool", "runs on GPU nodes where the site has them", default=True),
    "signal": Field(
        "table",
        "what is sent to the step before the time limit",
        fields={
            "name": Field(
                "text",
                "the signal the step saves on; absent: the step handles none",
                choices=("USR1", "USR2", "TERM"),
            ),
            "lead_s": Field(
                "int", "seconds before the limit", default=60, minimum=1, maximum=65535
            ),
        },
    ),
    "options": Field(
        "map",
        "what recipe_options may hold",
        keys=NAME,
        items=Field("table", "an option", fields=_OPTION),
    ),
    "config": Field("map", "default training configuration", items=Field("any", "")),
    "env": Field(
        "map",
        "environment of the job",
        keys=ENV_NAME,
        items=Field(
            "table",
            "a variable",
            fields={
                "value": Field("text", "value", required=True),
                "why": Field("text", "reason", required=True),
            },
        ),
    ),
    "init": Field(
        "map",
        "run.yaml values that `hpctrain init` writes; {name} {checkpoints} {data} {code} are filled"
        " in for the site",
        items=Field("any", ""),
    ),
    "ladder": Field(
        "table",
        "how `hpctrain ladder` makes a rung of a run",
        fields={
            "steps": Field(
                "list",
                "keys that hold the number of steps",
                items=Field("text", "a dotted key of run.yaml"),
            ),
            "global_batch": Field("text", "the key of the global batch, the same on every rung"),
            "accumulation": Field("text", "the key of gradient accumulation, which keeps it so"),
            "one_gpu": Field("map", "values on one GPU, by dotted key", items=Field("any", "")),
            "more_gpus": Field(
                "map", "values on several GPUs, by dotted key", items=Field("any", "")
            ),
        },
    ),
    "environment": Field(
        "table",
        "what `hpctrain doctor` looks for where the recipe runs",
        fields={
            "python": Field("text", "versions of Python, e.g. >=3.10"),
            "packages": Field(
                "map",
                "by package",
                items=Field(
                    "table",
                    "a package",
                    fields={
                        "versions": Field("text", "e.g. >=2.3,<3; empty: any", default=""),
                        "required": Field(
                            "bool", "the recipe does not run without it", default=True
                        ),
                        "why": Field("text", "reason", required=True),
                        "extras": Field(
                            "list",
                            "its extras that are used, whose bounds then count",
                            items=Field("text", "an extra"),
                        ),
                        "from_copy": Field(
                            "bool",
                            "it is installed from the working copy, and another package of its name"
                            " is not it",
                            default=False,
                        ),
                    },
                ),
            ),
            "git_option": Field("text", "the recipe option that names a working copy"),
            "git_branch": Field("text", "the branch that it must be on"),
            "git_bounds": Field(
                "list",
                "files of the working copy that bound the packages: a pyproject.toml, requirements"
                " files",
                items=Field("text", "a path in it"),
            ),
        },
    ),
    "takes_model": Field(
        "list",
        "dotted keys of run.yaml that name the model it starts from, where an earlier stage's model"
        " is put",
        items=Field("text", "e.g. recipe_options.model"),
    ),
    "rehearse": Field(
        "table",
        "what a rehearsal does, where there is no training framework",
        fields={
            "skip": Field(
                "list",
                "scripts of the run directory that need the framework, and so are not run",
                items=Field("text", "a file name"),
            ),
            "instead": Field(
                "map",
                "scripts that a file of the recipe's folder stands in for: Python runs it with the"
                " rehearsal's folder and the words",
                items=Field("text", "a file of the folder, by the script's name"),
            ),
            "all_gpus": Field("bool", "every task must see all GPUs of its node", default=False),
        },
    ),
    "proven": Field("text", "how the recipe is proven", default=""),
}


@dataclass(frozen=True)
class Recipe:
    """One recipe. `values` as in FIELDS; `options` the declared recipe_options; `folder` holds its
    templates."""

    name: str
    title: str
    module: str
    tasks: str
    options: Mapping[str, Field]
    values: Mapping[str, Any]
    document: Document
    folder: str


def list_recipes(base_dir: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, layer, folder) of every recipe there is; a name appears once, the strongest
    layer's."""
    seen = set()
    for label, folder in layer_dirs("templates", base_dir):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            path = os.path.join(folder, name)
            if name not in seen and os.path.isfile(os.path.join(path, "recipe.yaml")):
                seen.add(name)
                yield name, label, path


def load_recipe(name: str, where: str = "", base_dir: str = "") -> Recipe:
    """The recipe of that name. Raises UsageError with every problem of its file, or naming the
    nearest recipe."""
    known = {found: folder for found, _, folder in list_recipes(base_dir)}
    if name not in known:
        raise UsageError(f"there is no recipe `{name}`", where=where, hint=nearest(name, known))
    path = os.path.join(known[name], "recipe.yaml")
    document = load_yaml(path, name=f"templates/{name}/recipe.yaml")
    values, problems = check(document, FIELDS)
    if problems:
        raise UsageError(problems)
    options = {option: _field(declared) for option, declared in values["options"].items()}
    return Recipe(
        name,
        values["title"],
        values["module"],
        values["tasks"],
        options,
        values,
        document,
        known[name],
    )


def check_recipe_options(
    recipe: Recipe, document: Document
) -> tuple[dict[str, Any], list[Problem]]:
    """The run's `recipe_options` with the declared defaults, and every problem."""
    if not document.get("recipe_options"):
        data = {**(document.data or {}), "recipe_options": {}}
        document = Document(data, document.origins, document.key_origins, document.name)
    return check(document, recipe.options, ("recipe_options",))


def _field(declared: Mapping[str, Any]) -> Field:
    kind, items = declared["kind"], None
    if kind == "list":
        items = Field(declared["items"], "", multiline=declared["items"] == "text")
    elif kind == "map":
        items = Field("any", "")
    return Field(
        kind,
        declared["doc"],
        required=declared["required"],
        default=declared["default"],
        choices=tuple(declared["choices"]),
        minimum=declared["minimum"],
        maximum=declared["maximum"],
        items=items,
        multiline=kind in ("text", "any"),
    )
