"""What the rules of this package share while they decide: the run, the program's values, decisions
and problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.config.decision import Decision
from hpctrain.config.document import Document
from hpctrain.config.run import absolute
from hpctrain.recipes.contract import Context
from hpctrain.recipes.open_instruct.arguments import Argument, match_commit, table
from hpctrain.recipes.rules import Judge

SFT, DPO = "open_instruct/finetune.py", "open_instruct/dpo_tune_cache.py"


@dataclass(frozen=True)
class Names:
    """How one program calls what both have."""

    mixer: str
    splits: str
    transform: str
    target: str
    cache_dir: str
    cache_mode: str
    epochs: str
    clip: str


NAMES = {
    SFT: Names(
        "dataset_mixer_list",
        "dataset_mixer_list_splits",
        "dataset_transform_fn",
        "dataset_target_columns",
        "dataset_local_cache_dir",
        "dataset_cache_mode",
        "num_train_epochs",
        "clip_grad_norm",
    ),
    DPO: Names(
        "mixer_list",
        "mixer_list_splits",
        "transform_fn",
        "target_columns",
        "local_cache_dir",
        "cache_mode",
        "num_epochs",
        "max_grad_norm",
    ),
}


class Draft(Judge):
    """`values` are the program's arguments as they stand; each rule may add to them, and to
    decisions and problems."""

    def __init__(self, context: Context, program: str) -> None:
        super().__init__()
        self.context, self.spec, self.options = context, context.spec, context.options
        self.program = program
        self.names = NAMES[program]
        self.commit = match_commit(str(self.options["commit"]))
        self.arguments: Mapping[str, Argument] = table(program, self.commit)
        self.document: Document = context.config
        self.values: dict[str, Any] = dict(self.document.data or {})
        self.decisions: list[Decision] = []

    @property
    def processes_per_node(self) -> int:
        return int(self.options["processes_per_node"] or self.context.gpus_per_node or 1)

    @property
    def world_size(self) -> int:
        """Number of training processes: the launchers of all nodes start so many together."""
        return self.context.num_nodes * self.processes_per_node

    def get(self, name: str) -> Any:
        """The value that the program will have: the run's, else its own default."""
        if self.values.get(name) is not None:
            return self.values[name]
        return self.arguments[name].default if name in self.arguments else None

    def count(self, name: str) -> int | None:
        """A whole number of at least 1, None when it is not one."""
        value = self.get(name)
        value = int(value) if isinstance(value, str) and value.isdigit() else value
        return (
            value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None
        )

    def has(self, name: str) -> bool:
        return name in self.arguments

    def where(self, *path: Any) -> str:
        """The place of an argument in run.yaml (or in the recipe, whose default it then is)."""
        return self.document.where(*path)

    def option_where(self, *path: Any) -> str:
        return self.spec.where("recipe_options", *path)

    def path_option(self, name: str) -> str | None:
        """An option that is a path, absolute."""
        value = self.options[name]
        return absolute(value, self.spec.base_dir) if value else None

    def decide(self, name: str, value: Any, reason: str, where: str = "") -> None:
        self.decisions.append(Decision(name, value, reason, where))

    def local(self, text: str) -> str | None:
        """`text` as an absolute path where it is one (`/…`, `./…`, `~/…`), None for a name on the
        hub."""
        return (
            absolute(text, self.spec.base_dir) if text.startswith(("/", "./", "../", "~")) else None
        )
