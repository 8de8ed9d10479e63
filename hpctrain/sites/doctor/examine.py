"""Puts the checks together for a run, or for this machine alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.config.site import Site, load_site
from hpctrain.plan.check import secret_problems, shell_problems
from hpctrain.plan.make import Plan
from hpctrain.sites.doctor import cluster, places, python
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding, score
from hpctrain.sites.doctor.python import Pin

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
        return {"score": self.score, "ok": self.healthy, "findings": [finding.as_json() for finding in self.findings]}


def examine_run(plan: Plan, python_path: str | None, requirements: Sequence[str]) -> Examination:
    """Everything that a run needs, in the Python (and container) in which it would train."""
    wanted = plan.recipe.values["environment"]
    pins = [
        Pin(name, fields["versions"], f"recipe {plan.recipe.name}", fields["why"], fields["required"])
        for name, fields in wanted["packages"].items()
    ]
    findings: list[Finding] = []
    for path in requirements:
        more, other = python.read_requirements(path)
        pins += more
        findings += [
            Finding("packages", "requirements", NOT_SEEN, f"{where} is no plain requirement") for where in other
        ]
    name = python_path or str(plan.spec.recipe_options.get("python") or "python3")
    argv = [*plan.container, name]
    facts, said = (
        (None, f"the container {plan.spec.container} is not here")
        if _container_missing(plan)
        else python.probe(argv, pins)
    )
    if facts is None and _container_missing(plan):
        findings.append(Finding("python", "starts", NOT_SEEN, said, "run this at the site"))
        findings += python.contradictions(pins)
    else:
        vendor = plan.node_type.gpu_vendor if plan.gpus_per_node else None
        findings += python.judge_python(facts, said, wanted["python"] or "", pins, vendor)
    findings += places.disks(_folders(plan))
    findings += places.caches(os.environ)
    findings += [_of_problem("secrets", problem) for problem in secret_problems(plan)]
    if plan.spec.secrets and not any(finding.area == "secrets" for finding in findings):
        findings.append(Finding("secrets", "file", OK, f"{plan.spec.secrets} is yours alone, KEY=VALUE"))
    findings += _shell()
    option = wanted["git_option"]
    folder = plan.spec.recipe_options.get(option) if option else None
    if isinstance(folder, str):
        copy = os.path.join(plan.spec.base_dir, os.path.expanduser(folder))
        decided = next((decision.value for decision in plan.decisions if decision.name == "code.branch"), None)
        findings += places.working_copy(copy, wanted["git_branch"] or decided)
    findings += cluster.judge_cluster(plan.site)
    return Examination(tuple(findings))


def examine_here(site: str | None, python_path: str | None, requirements: Sequence[str]) -> Examination:
    """This machine without a run: its Python, caches, disks, shell, and Slurm against a profile where one is named."""
    pins: list[Pin] = []
    for path in requirements:
        pins += python.read_requirements(path)[0]
    facts, said = python.probe([python_path or sys.executable], pins)
    findings = [
        *python.judge_python(facts, said, "", pins, None),
        *places.disks({"home": "~", "here": "."}),
        *places.caches(os.environ),
        *_shell(),
    ]
    if site:
        found: Site = load_site(site)
        findings += cluster.judge_cluster(found)
    return Examination(tuple(findings))


def _shell() -> list[Finding]:
    found = [_of_problem("shell", problem) for problem in shell_problems(os.environ, {})]
    return found or [Finding("shell", "variables", OK, "nothing in this shell overrides or leaks into jobs")]


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
