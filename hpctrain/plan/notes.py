"""What the parts of a plan write down while they decide: decisions with reasons, and problems."""

from __future__ import annotations

from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.config.decision import Decision
from hpctrain.config.recipe import Recipe
from hpctrain.config.run import RunSpec
from hpctrain.config.site import Site


class Notes:
    """Collects the decisions and problems of one plan, each with its place in run.yaml or in the
    profile."""

    def __init__(self, spec: RunSpec, site: Site, recipe: Recipe) -> None:
        self.spec, self.site, self.recipe = spec, site, recipe
        self.decisions: list[Decision] = []
        self.problems: list[Problem] = []

    def decide(self, name: str, value: Any, reason: str, *path: Any, site: bool = False) -> Any:
        document = self.site.document if site else self.spec.document
        self.decisions.append(Decision(name, value, reason, document.where(*path) if path else ""))
        return value

    def error(
        self, what: str, *path: Any, why: str = "", hint: str = "", level: str = "error"
    ) -> None:
        self.problems.append(Problem(what, self.spec.where(*path), why, hint, level))

    def sorted_problems(self) -> list[Problem]:
        """Errors first, then by place with run.yaml first, each only once."""

        def key(problem: Problem) -> tuple[Any, ...]:
            parts = problem.where.rsplit(":", 2)
            numbers = [int(part) if part.isdigit() else 0 for part in parts[1:]]
            return (problem.level != "error", parts[0] != self.spec.source, parts[0], *numbers)

        return sorted(dict.fromkeys(self.problems), key=key)
