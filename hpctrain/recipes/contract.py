"""What a recipe is asked and what it answers.

A recipe module has one function, `resolve(context) -> Resolved`, pure: it turns the run's options
and configuration into the step's argv, its config files, the guard's facts, decisions with reasons,
and problems.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.shell import ShellText
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document
from hpctrain.config.recipe import Recipe
from hpctrain.config.run import RunSpec
from hpctrain.config.site import NodeType, Site
from hpctrain.recipes.facts import Fact


@dataclass(frozen=True)
class EnvVar:
    """A variable of the job with the reason printed beside it."""

    name: str
    value: str
    why: str = ""


@dataclass(frozen=True)
class Context:
    """What a recipe may look at: the run, the site, the shape that the plan chose, and the YAML
    files it reads.

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


@dataclass(frozen=True)
class Guard:
    """What the runtime guard must know of the recipe's checkpoints, see `hpctrain/runtime`.

    `target`: number in the folder name of the checkpoint that ends the run. `counter`: whether the
    framework continues from `latest` or from the greatest folder name. `retention`: it deletes old
    checkpoints by their names. `exported`: the run is done only when the framework has also
    exported its model into the checkpoint folder. `start_needs`: names that a start checkpoint must
    hold, beside what the layout asks for (verl's `critic`). `start_as`: symlink, hardlink or copy,
    how a start comes into the checkpoint folder. `start_folder`: another run's checkpoint folder,
    whose tracker names the start when the first link begins, or which holds `start_checkpoint`.
    `start_takes`: the words for what the framework takes from a start checkpoint [default: its
    weights alone]; `start_counts`: it goes on at the start's number, and not from 0.
    `scratch_from`: the words for what a run without a start begins from, such as a model's name
    [default: nothing]. `own_layout`: the layout that run.yaml describes, where `layout` is `own`.
    `any_ranks`: the framework lays a checkpoint out anew for another number of data-parallel ranks.
    """

    layout: str = "none"
    target: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    data_parallel: int | None = None
    expert_parallel: int | None = None
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
    own_layout: Mapping[str, Any] | None = None
    any_ranks: bool = False


@dataclass(frozen=True)
class HubRepo:
    """A repository of the Hugging Face hub that the job needs in the cache below `home` (an
    HF_HOME).

    `kind`: model, tokenizer or dataset, which decides the files. `where`: the place that names it.
    """

    what: str
    kind: str
    home: str
    repo_id: str
    revision: str
    where: str


@dataclass(frozen=True)
class Cadence:
    """Iterations in all, and between two checkpoints; None where unknown. `saves_on_signal`: before
    the time limit."""

    iterations: int | None = None
    save_every: int | None = None
    saves_on_signal: bool = False


@dataclass(frozen=True)
class Resolved:
    """What a recipe decided.

    `argv`: the step, run by every task; where it is a launcher that starts the node's processes,
    `on_node` are its words that only a task on that node can fill in, and `arguments` what comes
    after those. `tasks_argv`: how the words of the tasks begin that `argv` starts with an srun of
    its own. `configs`: text by file name, `config_for` the file of each mode. `files`: more files
    of the run directory, `runtime` more of its runtime/. `template`: values for the recipe's own
    template. `paths`: (what, path, where) that the job needs at the site; `hub`: what it needs of
    the Hugging Face hub there. `binds`: (what, path) that the job makes itself and a container must
    see. `placeholders`: path -> what a rehearsal writes there, where the job reads more than the
    file's name. `model`: the folder in which the finished run leaves its model in Hugging Face
    format, which a later stage of a pipeline may take; None where it leaves none. `facts`: what the
    job will open, for `check` to open before.
    """

    argv: tuple[str, ...] = ()
    on_node: tuple[ShellText, ...] = ()
    arguments: tuple[str, ...] = ()
    tasks_argv: tuple[str, ...] = ()
    workdir: str | None = None
    configs: Mapping[str, str] = field(default_factory=dict)
    config_for: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    runtime: Mapping[str, str] = field(default_factory=dict)
    env: tuple[EnvVar, ...] = ()
    guard: Guard = field(default_factory=Guard)
    cadence: Cadence = field(default_factory=Cadence)
    template: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[tuple[str, str, str], ...] = ()
    hub: tuple[HubRepo, ...] = ()
    binds: tuple[tuple[str, str], ...] = ()
    placeholders: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    facts: tuple[Fact, ...] = ()
    decisions: tuple[Decision, ...] = ()
    problems: tuple[Problem, ...] = ()


def resolve(context: Context) -> Resolved:
    """Let the recipe's module decide."""
    module = importlib.import_module(f"hpctrain.recipes.{context.recipe.module}")
    resolved = module.resolve(context)
    assert isinstance(resolved, Resolved)
    return resolved
