"""Ways to run the DPO trainer on tiny models: as real processes, never faked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from start_ranks import start_ranks

from . import tiny

HERE = Path(__file__).parent


class Answer(NamedTuple):
    """What rank 0 said of one training."""

    code: int
    problems: list[str]
    said: str


class Bench:
    """A folder with a policy, another model and pairs, where trainings can be run."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        tiny.write_model(path / "policy")
        tiny.write_model(path / "other", seed=1)
        tiny.write_model(path / "tied", seed=2, tie_word_embeddings=True)
        tiny.write_rows(path / "pairs.jsonl", tiny.text_rows(22))
        tiny.write_rows(path / "four.jsonl", tiny.text_rows(4, 5))

    def config(self, name: str, training: dict[str, Any], **keys: Any) -> Path:
        dataset = {"dataset_name": "./pairs.jsonl", "max_len": 64, **keys.pop("dataset", {})}
        base = {
            "batch_size": 4,
            "learning_rate": 1e-3,
            "log_steps": 1,
            "save_steps": 3,
            "max_steps": 7,
            "fsdp": True,
        }
        values = {
            "policy_name": "./policy",
            "precision": "fp32",
            **keys,
            "dataset": dataset,
            "dpo_training": {**base, **training},
        }
        path = self.path / f"{name}.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return path

    def order(
        self,
        name: str,
        mode: str = "scratch",
        checkpoint: Path | str = "",
        training: Any = (),
        folder: str = "",
        **keys: Any,
    ) -> dict[str, str]:
        """The HPCTRAIN_* environment of a training whose checkpoints and logs go to `name`."""
        return {
            "HPCTRAIN_MODE": mode,
            "HPCTRAIN_CONFIG": str(self.config(name, dict(training), **keys)),
            "HPCTRAIN_CHECKPOINT_DIR": str(self.path / (folder or name)),
            "HPCTRAIN_CHECKPOINT": str(checkpoint),
            "HPCTRAIN_RUN_DIR": str(self.path / f"{name}.run"),
        }

    def train_many(self, orders: Sequence[dict[str, str]], num_ranks: int) -> list[Answer]:
        """Many trainings in the same processes."""
        file = self.path / f"orders-{num_ranks}-{len(list(self.path.glob('orders-*')))}.json"
        file.write_text(json.dumps(orders))
        processes = start_ranks([str(HERE / "scenarios.py"), str(file)], {}, num_ranks)
        try:
            texts = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * num_ranks, texts
        return [Answer(*answer) for answer in json.loads(Path(f"{file}.0").read_text())]

    def metrics(self, name: str) -> dict[int, dict[str, Any]]:
        """The last line of each iteration."""
        lines = (self.path / f"{name}.run" / "metrics.jsonl").read_text().splitlines()
        return {found["iteration"]: found for found in map(json.loads, lines)}

    def weights(self, name: str) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        return dict(load_file(str(self.path / f"{name}.run" / "dpo_model" / "model.safetensors")))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("it's a $(touch canary) dir"))


@pytest.fixture(scope="session")
def same_state() -> Callable[[Path, Path], list[str]]:
    """Compares weights and optimizer of two checkpoints bit for bit, whatever ranks wrote them: the
    names of what differs."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    def read(path: Path) -> dict[str, Any]:
        whole = path.parent / f"{path.name}.pt"
        if not whole.exists():
            dcp_to_torch_save(str(path), str(whole))
        return flatten(torch.load(whole, weights_only=False), "")

    def flatten(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                key: leaf
                for part, child in value.items()
                for key, leaf in flatten(child, f"{name}/{part}").items()
            }
        return {name: value}

    def compare(one: Path, two: Path) -> list[str]:
        a, b = read(one), read(two)
        assert a.keys() == b.keys() and any(isinstance(value, torch.Tensor) for value in a.values())
        return [
            key
            for key in a
            if not (
                torch.equal(a[key], b[key])
                if isinstance(a[key], torch.Tensor)
                else a[key] == b[key]
            )
        ]

    return compare
