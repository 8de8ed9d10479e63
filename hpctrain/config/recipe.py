"""A recipe: what trains. Data from `templates/<recipe>/recipe.yaml`; its rules in `hpctrain/recipes/<module>.py`.

A recipe module has one function, `resolve(context) -> Resolved`, pure: it turns the run's options and configuration into
the step's argv, its config files, the guard's facts, decisions with reasons, and problems.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.frozen import frozen
from hpctrain.base.paths import layer_dirs
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document, load_yaml
from hpctrain.config.fields import Field, check, nearest
from hpctrain.config.run import RunSpec
from hpctrain.config.site import ENV_NAME, NAME, NodeType, Site

MODES = ("scratch", "finetune", "resume")

_OPTION = {
    "kind": Field(
        "text", "type", required=True, choices=("text", "path", "int", "number", "bool", "time", "list", "map", "any")
    ),
    "doc": Field("text", "what it means", required=True),
    "required": Field("bool", "must be given", default=False),
    "default": Field("any", "value when absent", nullable=True),
    "choices": Field("list", "allowed values", items=Field("text", "")),
    "items": Field("text", "type of a list's items", default="text", choices=("text", "path", "int", "number", "any")),
    "minimum": Field("number", "least value"),
    "maximum": Field("number", "greatest value"),
    "reads": Field("text", "hpctrain reads the file (or files) as this", choices=("yaml",)),
    "at_site": Field("bool", "a path on the cluster that the job needs", default=False),
    "example": Field("any", "a valid value, which `hpctrain init` shows", nullable=True),
}

FIELDS: dict[str, Field] = {
    "name": Field("text", "the recipe's name, equal to its folder's", required=True, pattern=NAME, shape="a name"),
    "title": Field("text", "one line on what it trains with", required=True),
    "module": Field("text", "module under hpctrain.recipes", required=True, pattern="[a-z_]+", shape="a module"),
    "tasks": Field("text", "one task per GPU, or one per node that starts the others", default="per_gpu", choices=("per_gpu", "per_node", "free")),
    "layout": Field("text", "checkpoint layout", default="none"),
    "needs_gpus": Field("bool", "runs on GPU nodes where the site has them", default=True),
    "signal": Field(
        "table",
        "what is sent to the step before the time limit",
        fields={
            "name": Field("text", "the signal the step saves on; absent: the step handles none", choices=("USR1", "USR2", "TERM")),
            "lead_s": Field("int", "seconds before the limit", default=60, minimum=1, maximum=65535),
        },
    ),
    "options": Field("map", "what recipe_options may hold", keys=NAME, items=Field("table", "an option", fields=_OPTION)),
    "config": Field("map", "default training configuration", items=Field("any", "")),
    "env": Field("map", "environment of the job", keys=ENV_NAME, items=Field(
        "table", "a variable", fields={"value": Field("text", "value", required=True), "why": Field("text", "reason", required=True)}
    )),
    "init": Field(
        "map",
        "run.yaml values that `hpctrain init` writes; {name} {checkpoints} {data} {code} are filled in for the site",
        items=Field("any", ""),
    ),
    "ladder": Field(
        "table",
        "how `hpctrain ladder` makes a rung of a run",
        fields={
            "steps": Field("list", "keys that hold the number of steps", items=Field("text", "a dotted key of run.yaml")),
            "global_batch": Field("text", "the key of the global batch, the same on every rung"),
            "accumulation": Field("text", "the key of gradient accumulation, which keeps it so"),
            "one_gpu": Field("map", "values on one GPU, by dotted key", items=Field("any", "")),
            "more_gpus": Field("map", "values on several GPUs, by dotted key", items=Field("any", "")),
        },
    ),
    "environment": Field(
        "table",
        "what `hpctrain doctor` looks for where the recipe runs",
        fields={
            "python": Field("text", "versions of Python, e.g. >=3.10"),
            "packages": Field("map", "by package", items=Field("table", "a package", fields={
                "versions": Field("text", "e.g. >=2.3,<3; empty: any", default=""),
                "required": Field("bool", "the recipe does not run without it", default=True),
                "why": Field("text", "reason", required=True),
            })),
            "git_option": Field("text", "the recipe option that names a working copy"),
            "git_branch": Field("text", "the branch that it must be on"),
        },
    ),
    "takes_model": Field(
        "list",
        "dotted keys of run.yaml that name the model it starts from, where an earlier stage's model is put",
        items=Field("text", "e.g. recipe_options.model"),
    ),
    "rehearse": Field("table", "what a rehearsal does, where there is no training framework", fields={
        "skip": Field("list", "scripts of the run directory that need the framework, and so are not run",
                      items=Field("text", "a file name")),
    }),
    "proven": Field("text", "how the recipe is proven", default=""),
}  # fmt: skip


@frozen
class Recipe:
    """One recipe. `values` as in FIELDS; `options` the declared recipe_options; `folder` holds its templates."""

    name: str
    title: str
    module: str
    tasks: str
    options: Mapping[str, Field]
    values: Mapping[str, Any]
    document: Document
    folder: str


@frozen
class EnvVar:
    """A variable of the job with the reason printed beside it."""

    name: str
    value: str
    why: str = ""


@frozen
class Context:
    """What a recipe may look at: the run, the site, the shape that the plan chose, and the YAML files it reads.

    `read` maps an option with `reads: yaml` to its documents. `gpus_per_node` is 0 on CPU nodes.
    """

    spec: RunSpec
    site: Site
    recipe: Recipe
    options: Mapping[str, Any]
    config: Document
    read: Mapping[str, tuple[Document, ...]]
    run_dir: str
    node_type: NodeType
    num_nodes: int
    gpus_per_node: int
    tasks_per_node: int

    @property
    def world_size(self) -> int:
        """Number of ranks: one per GPU, or one per task where there are none."""
        return self.num_nodes * (self.gpus_per_node or self.tasks_per_node)


@frozen
class Guard:
    """What the runtime guard must know of the recipe's checkpoints, see `hpctrain/runtime`.

    `target`: number in the folder name of the checkpoint that ends the run. `counter`: whether the framework
    continues from `latest` or from the greatest folder name. `retention`: it deletes old checkpoints by their names.
    `exported`: the run is done only when the framework has also exported its model into the checkpoint folder.
    `start_needs`: names that a start checkpoint must hold, beside what the layout asks for (verl's `critic`).
    `start_as`: symlink, hardlink or copy, how a start comes into the checkpoint folder. `start_folder`: another run's
    checkpoint folder, whose tracker names the start when the first link begins, or which holds `start_checkpoint`.
    `start_takes`: the words for what the framework takes from a start checkpoint [default: its weights alone];
    `start_counts`: it goes on at the start's number, and not from 0. `scratch_from`: the words for what a run without a
    start begins from, such as a model's name [default: nothing].
    """

    layout: str = "none"
    target: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    data_parallel: int | None = None
    zero_stage: int | None = None
    counter: str = "latest"
    quarantine: bool = True
    retention: bool = False
    exported: bool = False
    start_needs: tuple[str, ...] = ()
    start_as: str = "symlink"
    start_folder: str | None = None
    start_checkpoint: str | None = None
    start_takes: str = ""
    start_counts: bool = False
    scratch_from: str = ""


@frozen
class HubRepo:
    """A repository of the Hugging Face hub that the job needs in the cache below `home` (an HF_HOME).

    `kind`: model, tokenizer or dataset, which decides the files. `where`: the place that names it.
    """

    what: str
    kind: str
    home: str
    repo_id: str
    revision: str
    where: str


@frozen
class Cadence:
    """Iterations in all, and between two checkpoints; None where unknown. `saves_on_signal`: before the time limit."""

    iterations: int | None = None
    save_every: int | None = None
    saves_on_signal: bool = False


@frozen
class Resolved:
    """What a recipe decided.

    `argv`: the step, run by every task. `configs`: text by file name, `config_for` the file of each mode.
    `files`: more files of the run directory. `template`: values for the recipe's own template.
    `paths`: (what, path, where) that the job needs at the site; `hub`: what it needs of the Hugging Face hub there.
    `binds`: (what, path) that the job makes itself and a container must see.
    `placeholders`: path -> what a rehearsal writes there, where the job reads more than the file's name.
    `model`: the folder in which the finished run leaves its model in Hugging Face format, which a later stage of a
    pipeline may take; None where it leaves none.
    """

    argv: tuple[str, ...] = ()
    workdir: str | None = None
    configs: Mapping[str, str] = field(default_factory=dict)
    config_for: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    env: tuple[EnvVar, ...] = ()
    guard: Guard = field(default_factory=Guard)
    cadence: Cadence = field(default_factory=Cadence)
    template: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[tuple[str, str, str], ...] = ()
    hub: tuple[HubRepo, ...] = ()
    binds: tuple[tuple[str, str], ...] = ()
    placeholders: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    decisions: tuple[Decision, ...] = ()
    problems: tuple[Problem, ...] = ()


def list_recipes(base_dir: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, layer, folder) of every recipe there is; a name appears once, the strongest layer's."""
    seen = set()
    for label, folder in layer_dirs("templates", base_dir):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            path = os.path.join(folder, name)
            if name not in seen and os.path.isfile(os.path.join(path, "recipe.yaml")):
                seen.add(name)
                yield name, label, path


def load_recipe(name: str, where: str = "", base_dir: str = "") -> Recipe:
    """The recipe of that name. Raises UsageError with every problem of its file, or naming the nearest recipe."""
    known = {found: folder for found, _, folder in list_recipes(base_dir)}
    if name not in known:
        raise UsageError(f"there is no recipe `{name}`", where=where, hint=nearest(name, known))
    path = os.path.join(known[name], "recipe.yaml")
    document = load_yaml(path, name=f"templates/{name}/recipe.yaml")
    values, problems = check(document, FIELDS)
    if problems:
        raise UsageError(problems)
    options = {option: _field(declared) for option, declared in values["options"].items()}
    return Recipe(name, values["title"], values["module"], values["tasks"], options, values, document, known[name])


def check_recipe_options(recipe: Recipe, document: Document) -> tuple[dict[str, Any], list[Problem]]:
    """The run's `recipe_options` with the declared defaults, and every problem."""
    if not document.get("recipe_options"):
        data = {**(document.data or {}), "recipe_options": {}}
        document = Document(data, document.origins, document.key_origins, document.name)
    return check(document, recipe.options, ("recipe_options",))


def resolve(context: Context) -> Resolved:
    """Let the recipe's module decide."""
    module = importlib.import_module(f"hpctrain.recipes.{context.recipe.module}")
    resolved = module.resolve(context)
    assert isinstance(resolved, Resolved)
    return resolved


def _field(declared: Mapping[str, Any]) -> Field:
    kind = declared["kind"]
    return Field(
        kind,
        declared["doc"],
        required=declared["required"],
        default=declared["default"],
        choices=tuple(declared["choices"]),
        minimum=declared["minimum"],
        maximum=declared["maximum"],
        items=Field(declared["items"], "", multiline=declared["items"] == "text")
        if kind == "list"
        else Field("any", "")
        if kind == "map"
        else None,
        multiline=kind == "text",
    )
