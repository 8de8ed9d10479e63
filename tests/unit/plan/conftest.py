"""A site of our own and a run on it, planned by the real loader: tests change one thing and look at
what is decided."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import yaml

from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan

SITE = {
    "name": "mine",
    "title": "a machine",
    "docs_url": "https://example.org",
    "maintainers": ["us"],
    "verified": {"date": "2026-01-01", "by": "us", "evidence": "none"},
    "slurm": {"gpu_request": "gres"},
    "node_types": {
        "g": {
            "sockets": 1,
            "cores": 64,
            "usable_cores": 56,
            "threads_per_core": 2,
            "memory_gib": 480,
            "gpus": 8,
            "gpu_type": "mi250",
            "gpu_vendor": "amd",
            "cpu_bind": {7: "mask_cpu:0xfe"},
            "tmp": {"path": "/tmp", "kind": "ram"},
        },
        "c": {
            "sockets": 2,
            "cores": 128,
            "threads_per_core": 1,
            "memory_gib": 224,
            "gpus": 0,
            "tasks_per_node": 16,
        },
    },
    "partitions": {
        "large-g": {"node_type": "g", "max_nodes": 1024, "max_time": "2-00:00:00"},
        "small-g": {"node_type": "g", "max_nodes": 4, "max_time": "3-00:00:00", "max_submitted": 5},
        "dev-g": {"node_type": "g", "max_nodes": 32, "max_time": "03:00:00", "debug": True},
        "quick-g": {"node_type": "g", "max_nodes": 4, "max_time": "01:00:00"},
        "wide-g": {"node_type": "g", "min_nodes": 8, "max_nodes": 64, "max_time": "01:00:00"},
        "cpu": {"node_type": "c", "max_nodes": 512, "max_time": "2-00:00:00", "whole_nodes": True},
    },
}
RUN = {
    "name": "r",
    "site": "./site.yaml",
    "recipe": "command",
    "time": "2h",
    "nodes": 2,
    "gpus_per_node": 8,
    "recipe_options": {"argv": ["true"]},
}


@dataclass
class Planned:
    plan: Plan

    @property
    def decided(self):
        """Decision name -> (value, reason)."""
        return {one.name: (one.value, one.reason) for one in self.plan.decisions}

    @property
    def sbatch(self):
        return {one.option: one.value for one in self.plan.directives}

    @property
    def srun(self):
        return {one.option: one.value for one in self.plan.srun_options}

    @property
    def errors(self):
        return [problem.what for problem in self.plan.errors]

    def problem(self, words, level="error"):
        """The one problem of that level with these words."""
        (found,) = [one for one in self.plan.problems if one.level == level and words in one.what]
        return found


def merged(base, changes):
    """`base` with `changes` laid over it, tables key by key; None deletes."""
    out = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


@pytest.fixture
def planned(tmp_path):
    """`planned(run={…}, site={…})`: the plan of RUN on SITE with these changes."""

    def make(run=None, site=None):
        (tmp_path / "site.yaml").write_text(
            yaml.safe_dump(merged(SITE, site or {}), sort_keys=False)
        )
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(merged(RUN, run or {}), sort_keys=False))
        return Planned(load_plan(str(path)).plan)

    return make
