"""A NeoX run written to disk, planned by the real loader: tests change one thing and look at what
is said or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import indent

import pytest
import yaml

from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan

# Raw YAML by key, so that tests can write what a person would type. The shape is the fork's 30B
# model.
BASE = {
    "pipe_parallel_size": "0",
    "model_parallel_size": "8",
    "num_layers": "60",
    "hidden_size": "6144",
    "num_attention_heads": "48",
    "num_kv_heads": "8",
    "seq_length": "8192",
    "max_position_embeddings": "65536",
    "attention_config": '[[["flash"], 60]]',
    "optimizer": '{"type": "Adam", "params": {"lr": 1.6e-4, "betas": [0.9, 0.95], "eps": 1.0e-8}}',
    "zero_optimization": "{stage: 1}",
    "precision": "bfloat16",
    "warmup": "0.0",
    "gradient_clipping": "0.5",
    "tokenizer_type": "SPMTokenizer",
    "vocab_file": "/scratch/tok/model.model",
    "train_micro_batch_size_per_gpu": "3",
    "train_iters": "1337",
    "checkpoint_factor": "100",
    "checkpoint_activations": "true",
    "partition_activations": "true",
}
RUN = {
    "name": "ft",
    "site": "lumi",
    "recipe": "neox-sft",
    "account": "project_465001281",
    "partition": "standard-g",
    "nodes": "192",
    "time": '"20:00:00"',
    "container": "/scratch/c.sif",
    "checkpoint": "{start: /scratch/base/global_step423858, dir: /scratch/run}",
    "data": "{train: [/scratch/d/sft], valid: [/scratch/d/v], test: [/scratch/d/t]}",
}
OPTIONS = {"dir": "/project/neox", "flavor": "tilde", "base_config": "[base.yml]"}
UPSTREAM = {"flavor": "upstream"}


@dataclass
class Planned:
    plan: Plan
    inputs: Mapping[str, bytes]

    def said(self, level: str = "error") -> list[str]:
        """Problems as `where: what`, with file names as the loader gave them."""
        return [f"{p.where}: {p.what}" for p in self.plan.problems if p.level == level]

    def problem(self, part: str, level: str = "error"):
        """The one problem of that level whose text contains `part`."""
        found = [p for p in self.plan.problems if p.level == level and part in p.what]
        assert len(found) == 1, self.said("error") + self.said("warning")
        return found[0]

    def decision(self, name: str):
        return next(d for d in self.plan.decisions if d.name == name)

    def config(self, mode: str) -> dict:
        """The written config as NeoX reads it."""
        assert not self.plan.errors, self.said()
        text = self.plan.resolved.configs[self.plan.resolved.config_for[mode]]
        return yaml.load(text, Loader=yaml.FullLoader)  # noqa: S506 - what NeoX itself does


@pytest.fixture
def neox(tmp_path, monkeypatch):
    def plan(config="", base=None, run=None, options=None, more_bases=None) -> Planned:
        def raw(values):
            return "".join(
                f"{key}: {value}\n" for key, value in values.items() if value is not None
            )

        text = (
            raw({**RUN, **(run or {})})
            + "recipe_options:\n"
            + indent(raw({**OPTIONS, **(options or {})}), "  ")
        )
        if config:
            text += "config:\n" + indent(config.rstrip("\n") + "\n", "  ")
        (tmp_path / "run.yaml").write_text(text)
        (tmp_path / "base.yml").write_text(raw({**BASE, **(base or {})}))
        for name, content in (more_bases or {}).items():
            (tmp_path / name).write_text(content)
        monkeypatch.chdir(tmp_path)
        loaded = load_plan("run.yaml", (), str(tmp_path / "out"))
        return Planned(loaded.plan, loaded.inputs)

    return plan
