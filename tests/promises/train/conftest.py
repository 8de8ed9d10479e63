"""A tiny model, a tiny indexed dataset, and ways to run the trainer on them: as real processes,
never faked."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from start_ranks import start_ranks

HERE = Path(__file__).parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.1,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_dropout": 0.1,
}
CONFIG: dict[str, Any] = {
    "model": "llama.json",
    "train_data_paths": ["data"],
    "seq_length": 64,
    "train_iters": 6,
    "precision": "fp32",
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": 4,
    "loss_mask_pairs": [7, 7],
    "zero_stage": 1,
    "loss_mask_alternating_individual": [8],
    "lr": 1.0e-3,
    "warmup_iters": 2,
    "checkpoint_factor": 3,
    "log_interval": 1,
}


def dialogues(count: int = 200, seed: int = 0) -> list[np.ndarray]:
    """Documents `7 user 7 8 reply 8 2`, whose reply is each user token plus one: something a model
    can learn."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        tokens: list[int] = []
        for _ in range(int(rng.integers(1, 3))):
            user = rng.integers(10, 40, int(rng.integers(2, 10))).tolist()
            tokens += [7, *user, 7, 8, *[token + 1 for token in user], 8]
        out.append(np.array([*tokens, 2], dtype=np.uint16))
    return out


def write_indexed(prefix: Path, documents: Sequence[np.ndarray]) -> None:
    """PREFIX.bin and PREFIX.idx, byte by byte as GPT-NeoX documents the format."""
    sizes = np.array([len(document) for document in documents], dtype="<i4")
    np.concatenate(documents).astype("<u2").tofile(f"{prefix}.bin")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * 2
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    body = (
        sizes.tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    )
    Path(f"{prefix}.idx").write_bytes(header + body)


class Bench:
    """A directory with model configs and data, where trainings can be run."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "llama.json").write_text(json.dumps(LLAMA))
        (path / "neox.json").write_text(json.dumps(NEOX))
        write_indexed(path / "data", dialogues())

    def order(
        self, name: str, mode: str = "scratch", checkpoint: Path | str = "", **changes: Any
    ) -> dict[str, str]:
        """The HPCTRAIN_* environment of a training whose checkpoints and logs go to `name`."""
        config = self.path / f"{name}.yml"
        config.write_text(json.dumps({**CONFIG, **changes}))  # JSON is YAML
        return {
            "HPCTRAIN_MODE": mode,
            "HPCTRAIN_CONFIG": str(config),
            "HPCTRAIN_CHECKPOINT_DIR": str(self.path / name),
            "HPCTRAIN_CHECKPOINT": str(checkpoint),
            "HPCTRAIN_RUN_DIR": str(self.path / f"{name}.run"),
        }

    def train(self, order: dict[str, str], num_ranks: int = 1) -> list[tuple[int, str, str]]:
        """`python -m hpctrain.train.sft` on so many ranks: each rank's exit code, stdout,
        stderr."""
        processes = start_ranks(["-m", "hpctrain.train.sft"], order, num_ranks)
        texts = [process.communicate(timeout=600) for process in processes]
        return [(process.returncode, *text) for process, text in zip(processes, texts)]

    def train_many(
        self, orders: Sequence[dict[str, str]], num_ranks: int
    ) -> list[tuple[int, list[str]]]:
        """Many trainings in the same processes: the exit code, the same on every rank, and all
        ranks' problems for each."""
        file = self.path / f"orders-{num_ranks}-{len(list(self.path.glob('orders-*')))}.json"
        file.write_text(json.dumps(orders))
        processes = start_ranks([str(HERE / "scenarios.py"), str(file)], {}, num_ranks)
        texts = [process.communicate(timeout=900) for process in processes]
        assert [process.returncode for process in processes] == [0] * num_ranks, texts
        by_rank = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(num_ranks)]
        answers = []
        for order in zip(*by_rank):
            codes = {code for code, _ in order}
            assert len(codes) == 1, order
            # What every rank says is said once; what only one of them knows is there too.
            answers.append(
                (
                    codes.pop(),
                    list(dict.fromkeys(problem for _, found in order for problem in found)),
                )
            )
        return answers

    def latest(self, name: str) -> str:
        return (self.path / name / "latest").read_text()

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.path / f"{name}.run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("it's a $(touch canary) dir"))


@pytest.fixture(scope="session")
def same_tensors() -> Callable[[Path, Path], list[str]]:
    """Compares two checkpoints bit for bit: the names of what differs."""
    import torch

    def flatten(value: Any, name: str) -> dict[str, Any]:
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, (list, tuple))
            else ()
        )
        out = {} if items else {name: value}
        for key, child in items:
            out.update(flatten(child, f"{name}/{key}"))
        return out

    def equal(one: Any, two: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return (
                isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
            )
        return isinstance(one, type(two)) and (
            not isinstance(one, (int, float, str, bool)) or one == two
        )

    def compare(one: Path, two: Path) -> list[str]:
        files = sorted(path.name for path in one.glob("*.pt"))
        assert files and files == sorted(path.name for path in two.glob("*.pt"))
        different = []
        for file in files:
            a, b = (
                flatten(torch.load(path / file, weights_only=False), file) for path in (one, two)
            )
            a, b = ({k: v for k, v in x.items() if "run_id" not in k} for x in (a, b))
            assert a.keys() == b.keys()
            different += [name for name in a if not equal(a[name], b[name])]
        return different

    return compare
