"""Puts the checks together for a run, or for this machine alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.errors import Refused
from hpctrain.config.run import absolute
from hpctrain.config.site import Site, load_site
from hpctrain.config.trust import require_trust
from hpctrain.plan.check import secret_problems, shell_problems
from hpctrain.plan.make import Plan
from hpctrain.sites.doctor import cluster, places, python
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding, score
from hpctrain.sites.doctor.versions import Pin, contradictions
from hpctrain.sites.doctor.wishes import read_checkout, read_requirements

_LEVELS = {"error": PROBLEM, "warning": WARNING, "note": NOT_SEEN}


@dataclass(frozen=True)
class Examination:
    """All findings, and the score over those that saw something."""

    findings: tuple[Finding, ...]

    @property
    def score(self) -> int | None:
        return score(self.findings)

    @property
    def healthy(self) -> bool:
        return not any(finding.result == PROBLEM for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "ok": self.healthy,
            "findings": [finding.as_json() for finding in self.findings],
        }


def examine_run(plan: Plan, python_path: str | None, requirements: Sequence[str]) -> Examination:
    """Everything that a run needs, in the Python (and container) in which it would train."""
    wanted, copy = plan.recipe.values["environment"], _working_copy(plan)
    pins = _of_recipe(plan, copy)
    source = f"recipe {plan.recipe.name}"
    pythons = [Pin("python", wanted["python"], source)] if wanted["python"] else []
    findings: list[Finding] = []
    if copy and wanted["git_bounds"]:
        checkout = read_checkout(copy, wanted["git_bounds"], list(wanted["packages"]))
        pins += checkout.pins
        if checkout.python:
            pythons.append(Pin("python", checkout.python, checkout.python_source))
    more, unread = _of_files(requirements)
    pins, findings = [*pins, *more], [*findings, *unread]
    name = python_path or str(plan.spec.recipe_options.get("python") or "python3")
    findings += _ask_python(plan, name, pins, pythons, mine=name == python_path)
    findings += places.disks(_folders(plan))
    findings += places.caches({**os.environ, **{one.name: one.value for one in plan.env}})
    findings += [_of_problem("secrets", problem) for problem in secret_problems(plan)]
    if plan.spec.secrets and not any(finding.area == "secrets" for finding in findings):
        findings.append(
            Finding("secrets", "file", OK, f"{plan.spec.secrets} is yours alone, KEY=VALUE")
        )
    findings += _shell()
    if copy:
        decided = next(
            (decision.value for decision in plan.decisions if decision.name == "code.branch"), None
        )
        findings += places.working_copy(copy, wanted["git_branch"] or decided)
    findings += cluster.judge_cluster(plan.site)
    return Examination(tuple(findings))


def _ask_python(
    plan: Plan, name: str, pins: list[Pin], pythons: list[Pin], mine: bool
) -> Iterator[Finding]:
    """What the run's Python says of itself; one that run.yaml names (not `mine`) is started only
    where nobody else can have put it there."""
    try:
        plan.site.check_trust()
        if os.sep in name and not plan.container and not mine:
            require_trust(absolute(name, plan.spec.base_dir), "this Python")
    except Refused as refusal:
        problem = refusal.problems[0]
        yield Finding("python", "starts", PROBLEM, problem.what, problem.hint)
        yield from contradictions(pins)
        return
    if _container_missing(plan):
        missing = f"the container {plan.spec.container} is not here"
        yield Finding("python", "starts", NOT_SEEN, missing, "run this at the site")
        yield from contradictions(pins)
        return
    facts, said = python.probe([*plan.container, name], pins)
    vendor = plan.node_type.gpu_vendor if plan.gpus_per_node else None
    yield from python.judge_python(facts, said, pythons, pins, vendor)


def examine_here(
    site: str | None, python_path: str | None, requirements: Sequence[str]
) -> Examination:
    """This machine without a run: its Python, caches, disks, shell, and Slurm against a profile
    where one is named."""
    pins, unread = _of_files(requirements)
    facts, said = python.probe([python_path or sys.executable], pins)
    findings = [
        *unread,
        *python.judge_python(facts, said, [], pins, None),
        *places.disks({"home": "~", "here": "."}),
        *places.caches(os.environ),
        *_shell(),
    ]
    if site:
        found: Site = load_site(site)
        findings += cluster.judge_cluster(found)
    return Examination(tuple(findings))


def _of_recipe(plan: Plan, copy: str) -> list[Pin]:
    """The packages that the recipe needs; `copy` is the working copy that some are installed
    from."""
    pins = []
    for name, fields in plan.recipe.values["environment"]["packages"].items():
        folder = copy if fields["from_copy"] else ""
        source, extras = f"recipe {plan.recipe.name}", tuple(fields["extras"])
        wish = Pin(name, fields["versions"], source, fields["why"], fields["required"])
        pins.append(replace(wish, extras=extras, folder=folder))
    return pins


def _of_files(paths: Sequence[str]) -> tuple[list[Pin], list[Finding]]:
    """The pins of requirements files, and a finding for each line that is none."""
    pins: list[Pin] = []
    findings: list[Finding] = []
    for path in paths:
        more, other = read_requirements(path)
        pins += more
        findings += [Finding("packages", "requirements", NOT_SEEN, what) for what in other]
    return pins, findings


def _working_copy(plan: Plan) -> str:
    """The working copy that the recipe's code is in, empty where it has none."""
    option = plan.recipe.values["environment"]["git_option"]
    folder = plan.spec.recipe_options.get(option) if option else None
    return absolute(folder, plan.spec.base_dir) if isinstance(folder, str) else ""


def _shell() -> list[Finding]:
    found = [_of_problem("shell", problem) for problem in shell_problems(os.environ, {})]
    return found or [
        Finding("shell", "variables", OK, "nothing in this shell overrides or leaks into jobs")
    ]


def _of_problem(area: str, problem: Any) -> Finding:
    return Finding(area, problem.where or area, _LEVELS[problem.level], problem.what, problem.hint)


def _container_missing(plan: Plan) -> bool:
    return bool(plan.spec.container) and not os.path.exists(plan.spec.container or "")


def _folders(plan: Plan) -> dict[str, str]:
    out = {"home": "~", "run directory": plan.run_dir}
    if plan.spec.checkpoint_dir:
        out["checkpoints"] = plan.spec.checkpoint_dir
    out["temporary files"] = os.environ.get("TMPDIR", "/tmp")
    return out
