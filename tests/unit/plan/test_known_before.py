"""What a link would refuse is said before anything is queued: the same rules, asked earlier."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from hpctrain.plan.checkpoints import checkpoint_problems
from hpctrain.plan.load import load_plan

EXAMPLES = Path(__file__).parents[3] / "examples"
ADVERSARIAL = str(EXAMPLES / "verl-gad/adversarial/run.yaml")


def said(run: str, *changes: str) -> dict[str, str]:
    """The problems that `check` has with the run's checkpoints: their level by their text."""
    plan = load_plan(run, changes).plan
    return {problem.what: problem.level for problem in checkpoint_problems(plan)}


def the_error(run: str, *changes: str) -> str:
    errors = [what for what, level in said(run, *changes).items() if level == "error"]
    assert len(errors) == 1, said(run, *changes)
    return errors[0]


def verl(folder: Path, step: int, world: int, roles: tuple[str, ...] = ("actor", "critic")) -> Path:
    path = folder / f"global_step_{step}"
    for role in roles:
        (path / role).mkdir(parents=True)
        for kind in ("model", "optim", "extra_state"):
            for rank in range(world):
                name = f"{kind}_world_size_{world}_rank_{rank}.pt"
                (path / role / name).write_bytes(checkpoints.torch_file({"step": step}))
    (path / "data.pt").write_bytes(checkpoints.torch_file({"step": step}))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return path


class TestVerl:
    """The example's run has 8 ranks and begins from another run's folder."""

    def changes(self, tmp_path: Path) -> tuple[str, str]:
        return f"checkpoint.start={tmp_path}/warmup", f"checkpoint.dir={tmp_path}/to"

    def test_a_start_of_as_many_ranks_with_all_parts_is_taken(self, tmp_path: Path) -> None:
        verl(tmp_path / "warmup", 2204, 8)
        assert said(ADVERSARIAL, *self.changes(tmp_path)) == {}

    def test_a_start_without_a_critic(self, tmp_path: Path) -> None:
        verl(tmp_path / "warmup", 2204, 8, roles=("actor",))
        assert "critic" in the_error(ADVERSARIAL, *self.changes(tmp_path))

    def test_a_start_of_another_number_of_ranks(self, tmp_path: Path) -> None:
        verl(tmp_path / "warmup", 2204, 4)
        error = the_error(ADVERSARIAL, *self.changes(tmp_path))
        assert "4 ranks" in error and "8" in error

    def test_half_a_start(self, tmp_path: Path) -> None:
        start = verl(tmp_path / "warmup", 2204, 8)
        os.unlink(start / "critic" / "optim_world_size_8_rank_7.pt")
        assert "optim_world_size_8_rank_7.pt" in the_error(ADVERSARIAL, *self.changes(tmp_path))

    def test_a_folder_that_nothing_was_saved_in_yet_is_asked_later(self, tmp_path: Path) -> None:
        (tmp_path / "warmup").mkdir()
        assert "error" not in said(ADVERSARIAL, *self.changes(tmp_path)).values()

    def test_once_the_run_has_its_own_the_start_is_not_asked(self, tmp_path: Path) -> None:
        verl(tmp_path / "warmup", 2204, 8, roles=("actor",))
        verl(tmp_path / "to", 2304, 8)
        assert said(ADVERSARIAL, *self.changes(tmp_path)) == {}

    def test_its_own_checkpoint_of_another_number_of_ranks(self, tmp_path: Path) -> None:
        verl(tmp_path / "warmup", 2204, 8)
        verl(tmp_path / "to", 2304, 16)
        assert "16 ranks" in the_error(ADVERSARIAL, *self.changes(tmp_path))


class TestMegatron:
    """Its sizes are read from the program's own arguments, and from those in the checkpoint."""

    def run(self, tmp_path: Path, *argv: str) -> str:
        (tmp_path / "run.yaml").write_text(
            "name: r\nsite: lumi\nrecipe: command\naccount: project_465001281\n"
            "partition: standard-g\nnodes: 2\ntime: 1h\ncheckpoint: {dir: ck}\n"
            f"recipe_options: {{argv: {json.dumps(['train.py', *argv])}, layout: megatron}}\n"
        )
        return str(tmp_path / "run.yaml")

    @pytest.fixture(autouse=True)
    def checkpoint(self, tmp_path: Path) -> None:
        sizes: dict[str, Any] = {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 1,
            "expert_model_parallel_size": 2,
        }
        for tensor in range(2):
            for expert in range(2):
                path = tmp_path / f"ck/iter_0000100/mp_rank_{tensor:02d}_{expert:03d}"
                path.mkdir(parents=True)
                told = {"args": argparse.Namespace(**sizes), "iteration": 100}
                with zipfile.ZipFile(path / "model_optim_rng.pt", "w") as archive:
                    archive.writestr("a/data.pkl", pickle.dumps(told, protocol=2))
        (tmp_path / "ck/latest_checkpointed_iteration.txt").write_text("100")

    @pytest.mark.parametrize("form", ["{} {}", "{}={}"])
    def test_the_same_sizes_are_taken(self, tmp_path: Path, form: str) -> None:
        argv = [
            form.format("--tensor-model-parallel-size", 2),
            form.format("--expert-model-parallel-size", 2),
        ]
        assert said(self.run(tmp_path, *" ".join(argv).split())) == {}

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("--tensor-model-parallel-size", "2 tensor-parallel"),
            ("--pipeline-model-parallel-size", "1 pipeline"),
            ("--expert-model-parallel-size", "2 expert-parallel"),
        ],
    )
    def test_another_size(self, tmp_path: Path, option: str, words: str) -> None:
        for argv in ([option, "4"], [f"{option}=4"], [option, "1", option, "4"]):
            error = the_error(self.run(tmp_path, *argv))
            assert words in error and "the plan has 4" in error

    def test_sizes_that_nothing_tells_are_not_guessed(self, tmp_path: Path) -> None:
        for argv in ([], ["--tensor-model-parallel-size"], ["--tensor-model-parallel-size=$TP"]):
            assert said(self.run(tmp_path, *argv)) == {}


class TestDeepSpeed:
    """hpctrain's own trainer on the example's ranks."""

    def save(self, path: Path, data_ranks: int, model_ranks: int = 1) -> None:
        checkpoints.save(str(path), 200, model_ranks, data_ranks, lineage="a")

    def run(self) -> str:
        return str(EXAMPLES / "lumi-sft/run.yaml")

    def test_its_own_checkpoint_of_another_number_of_data_parallel_ranks(
        self, tmp_path: Path
    ) -> None:
        self.save(tmp_path / "ck", 3)
        assert "3 data-parallel ranks" in the_error(self.run(), f"checkpoint.dir={tmp_path}/ck")

    def test_another_size_of_the_model_in_neox(self, tmp_path: Path) -> None:
        neox = str(EXAMPLES / "lumi-neox-sft/run.yaml")
        self.save(tmp_path / "ck", 8, 3)
        assert "3 model-parallel ranks" in the_error_among(neox, f"checkpoint.dir={tmp_path}/ck")


def the_error_among(run: str, *changes: str) -> str:
    errors = [what for what, level in said(run, *changes).items() if level == "error"]
    return "\n".join(errors)
