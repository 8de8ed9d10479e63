"""A start that is another run's folder: its tracker names the step when the first link begins, and
never again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from hpctrain.runtime import copying
from hpctrain.runtime import link as guard
from hpctrain.runtime.files import read_records
from hpctrain.runtime.settings import read_settings

TRACKER = "latest_checkpointed_iteration.txt"


class Adversarial:
    """A run directory whose start is the folder `warmup`, and its links."""

    def __init__(
        self, top: Path, way: str = "hardlink", step: int | None = None, ranks: int = 2
    ) -> None:
        self.run_dir, self.warmup, self.ckpt, self.jobs = (
            top / "run's",
            top / "warm up",
            top / "adversarial",
            0,
        )
        self.run_dir.mkdir()
        chosen = str(self.warmup / f"global_step_{step}") if step else None
        source = {
            "stage": "",
            "run_dir": str(self.warmup),
            "hand_over": "folder",
            "checkpoint": chosen,
            "model": None,
        }
        (self.run_dir / "plan.json").write_text(
            json.dumps(
                {
                    "guard": {
                        "schema_version": 1,
                        "run": "adversarial",
                        "layout": "verl",
                        "checkpoint_dir": str(self.ckpt),
                        "start": None,
                        "data_parallel": ranks,
                        "target": 4408,
                        "give_up_after": 3,
                        "counter": "latest",
                        "start_as": way,
                        "start_needs": ["actor", "critic", "data.pt"],
                        "from": source,
                    }
                }
            )
        )

    def begin(self) -> dict[str, str]:
        self.jobs += 1
        return guard.begin(
            str(self.run_dir), self.jobs, {"SLURM_JOB_ID": str(self.jobs)}, lambda text: None
        )

    def end(self, code: int = 0) -> None:
        guard.end(str(self.run_dir), code, {"SLURM_JOB_ID": str(self.jobs)}, lambda text: None)

    @property
    def reason(self) -> str:
        return str(read_records(str(self.run_dir / "links.jsonl"))[-1]["reason"])


def save(
    folder: Path,
    step: int,
    world: int = 2,
    roles: tuple[str, ...] = ("actor", "critic"),
    tracker: bool = True,
) -> Path:
    path = folder / f"global_step_{step}"
    for role in roles:
        (path / role).mkdir(parents=True)
        for kind in ("model", "optim", "extra_state"):
            for rank in range(world):
                (path / role / f"{kind}_world_size_{world}_rank_{rank}.pt").write_bytes(
                    checkpoints.torch_file({"step": step})
                )
    (path / "data.pt").write_bytes(checkpoints.torch_file({"step": step}))
    if tracker:
        (folder / TRACKER).write_text(str(step))
    return path


def files(folder: Path) -> dict[str, bytes]:
    found = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".hpctrain-")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("way", ["hardlink", "copy", "symlink"])
def test_the_trackers_step_is_brought_in_and_stays_the_start(tmp_path: Path, way: str) -> None:
    run = Adversarial(tmp_path, way)
    save(run.warmup, 2100)
    start = save(run.warmup, 2204)
    save(run.warmup, 2300, tracker=False)  # a save that was cut off before its tracker
    before = files(run.warmup)
    found = run.begin()
    inside = run.ckpt / "global_step_2204"

    assert (found["HPCTRAIN_DECISION"], found["HPCTRAIN_MODE"], found["HPCTRAIN_ITERATION"]) == (
        "run",
        "finetune",
        "2204",
    )
    assert (
        found["HPCTRAIN_CHECKPOINT"] == str(inside) and (run.ckpt / TRACKER).read_bytes() == b"2204"
    )
    assert (
        inside.is_symlink() == (way == "symlink")
        and files(inside) == files(start)
        and files(run.warmup) == before
    )
    assert (inside / "data.pt").samefile(start / "data.pt") == (way != "copy")
    run.end(1)

    save(run.warmup, 2500)  # the warmup goes on: this run's start does not move
    again = run.begin()
    assert (again["HPCTRAIN_MODE"], again["HPCTRAIN_ITERATION"]) == ("finetune", "2204")
    assert read_settings(str(run.run_dir)).start == str(start)
    run.end(1)
    save(run.ckpt, 2304)
    assert run.begin()["HPCTRAIN_ITERATION"] == "2304"
    assert sorted(os.listdir(run.warmup)) == [
        "global_step_2100",
        "global_step_2204",
        "global_step_2300",
        "global_step_2500",
        TRACKER,
    ]


@pytest.mark.parametrize("way", ["hardlink", "copy"])
def test_a_run_that_has_its_start_outlives_the_other_runs_folder(tmp_path: Path, way: str) -> None:
    run = Adversarial(tmp_path, way)
    save(run.warmup, 2204)
    run.begin()
    run.end(1)
    shutil.rmtree(run.warmup)
    found = run.begin()

    assert (found["HPCTRAIN_DECISION"], found["HPCTRAIN_MODE"], found["HPCTRAIN_ITERATION"]) == (
        "run",
        "finetune",
        "2204",
    )


def test_a_chosen_step_is_taken_instead_of_the_trackers(tmp_path: Path) -> None:
    run = Adversarial(tmp_path, step=2100)
    save(run.warmup, 2100)
    save(run.warmup, 2204)

    assert run.begin()["HPCTRAIN_ITERATION"] == "2100"
    assert (run.ckpt / TRACKER).read_text() == "2100"


@pytest.mark.parametrize(
    "break_it,words",
    [
        (lambda start: (start.parent / TRACKER).unlink(), f"has no `{TRACKER}`"),
        (lambda start: (start.parent / TRACKER).write_text("soon"), "names no checkpoint"),
        (lambda start: (start.parent / TRACKER).write_text("../2204"), "names no checkpoint"),
        (lambda start: (start.parent / TRACKER).write_text("9999"), "is not there"),
        (lambda start: (start / "data.pt").unlink(), "`data.pt`"),
        (lambda start: shutil.rmtree(start / "critic"), "it has no `critic`"),
        (
            lambda start: (start / "critic" / "optim_world_size_2_rank_1.pt").unlink(),
            "optim shards of the critic",
        ),
        (
            lambda start: (start / "actor" / "model_world_size_2_rank_0.pt").write_bytes(
                b"PK\3\4 cut"
            ),
            "model_world_size_2_rank_0.pt",
        ),
        (lambda start: shutil.rmtree(start.parent), f"has no `{TRACKER}`"),
    ],
)
def test_what_is_no_whole_start_ends_the_chain_before_any_gpu_works_and_may_be_mended(
    tmp_path: Path, break_it: Any, words: str
) -> None:
    run = Adversarial(tmp_path)
    break_it(save(run.warmup, 2204))
    assert run.begin()["HPCTRAIN_DECISION"] == "gave_up"
    assert words in run.reason and "pipeline" not in run.reason
    assert (
        not (run.run_dir / "hand_over.json").exists()
        and not (run.ckpt / "global_step_2204").exists()
    )

    shutil.rmtree(run.warmup, ignore_errors=True)
    save(run.warmup, 2250)
    assert run.begin()["HPCTRAIN_ITERATION"] == "2250"


def test_shards_of_another_number_of_ranks_are_refused_at_the_start_and_on_a_resume(
    tmp_path: Path,
) -> None:
    run = Adversarial(tmp_path, ranks=4)
    save(run.warmup, 2204)
    assert (
        run.begin()["HPCTRAIN_DECISION"] == "gave_up"
        and "was saved by 2 ranks, and the plan has 4" in run.reason
    )

    save(run.ckpt, 2304)  # made when the run had two ranks
    before = files(run.ckpt)
    found = run.begin()
    assert found["HPCTRAIN_DECISION"] == "gave_up" and "no other number can load it" in run.reason
    assert files(run.ckpt) == before


@pytest.mark.parametrize("way", ["hardlink", "copy"])
def test_a_crash_while_it_is_brought_in_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    run = Adversarial(tmp_path, way)
    start = save(run.warmup, 2204)
    name = "_hard_link" if way == "hardlink" else "_copy"
    real, done = getattr(copying, name), []

    def crash(path: str, to: str) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(path)
        real(path, to)

    monkeypatch.setattr(copying, name, crash)
    with pytest.raises(KeyboardInterrupt):
        run.begin()
    assert not (run.ckpt / "global_step_2204").exists() and not (run.ckpt / TRACKER).exists()

    monkeypatch.setattr(copying, name, real)
    assert run.begin()["HPCTRAIN_ITERATION"] == "2204"
    assert files(run.ckpt / "global_step_2204") == files(start)


def test_nothing_is_brought_in_through_a_link_in_the_checkpoint_folder(tmp_path: Path) -> None:
    run = Adversarial(tmp_path)
    save(run.warmup, 2204)
    precious = save(tmp_path / "precious", 2204)
    run.ckpt.mkdir()
    (run.ckpt / "global_step_2204").symlink_to(precious)
    before = files(precious)

    assert run.begin()["HPCTRAIN_DECISION"] == "gave_up" and "links to" in run.reason
    assert files(precious) == before
