"""What one stage of a pipeline hands to the next, decided when the next stage's link starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import checkpoints
import pytest

from hpctrain.runtime import copying
from hpctrain.runtime import link as guard
from hpctrain.runtime.files import append_record, read_records
from hpctrain.runtime.settings import read_settings


class Stages:
    """Two run directories with nothing but a plan: `first` hands on to `second`."""

    def __init__(
        self, top: Path, way="symlink", target=9, hand_over="checkpoint", layout="deepspeed", **more
    ):
        self.top, self.said = top, []
        self.first, self.second, self.from_ckpt, self.ckpt = (
            top / "a",
            top / "b's",
            top / "ck a",
            top / "ck b",
        )
        self.jobs = 0
        self.plan(self.first, checkpoint_dir=str(self.from_ckpt), target=target, layout=layout)
        expected = None if target is None else str(self.from_ckpt / f"global_step{target}")
        source = {
            "stage": "warmup",
            "run_dir": str(self.first),
            "hand_over": hand_over,
            "checkpoint": expected,
            "model": str(top / "model"),
        }
        self.plan(
            self.second,
            checkpoint_dir=str(self.ckpt),
            target=5,
            start_as=way,
            layout=layout,
            **{"from": source, **more},
        )

    def plan(self, run_dir, **changes):
        run_dir.mkdir(exist_ok=True)
        given = {
            "schema_version": 1,
            "run": run_dir.name,
            "start": None,
            "tensor_parallel": 1,
            "give_up_after": 3,
            "counter": "latest",
        }
        (run_dir / "plan.json").write_text(json.dumps({"guard": {**given, **changes}}))

    def begin(self, run_dir=None):
        self.jobs += 1
        self.said = []
        environ = {"SLURM_JOB_ID": str(self.jobs), "HPCTRAIN_LOCK_WAIT_S": "0.2"}
        return guard.begin(str(run_dir or self.second), self.jobs, environ, self.said.append)

    def end(self, code=0, run_dir=None):
        guard.end(
            str(run_dir or self.second), code, {"SLURM_JOB_ID": str(self.jobs)}, lambda text: None
        )

    def names(self):
        return sorted(name for name in os.listdir(self.ckpt) if name[0] != ".")

    @property
    def reason(self):
        return read_records(str(self.second / "links.jsonl"))[-1]["reason"]


def test_a_stage_that_did_not_reach_its_target_makes_the_next_give_up_and_say_why(tmp_path):
    stages = Stages(tmp_path)
    assert stages.begin()["HPCTRAIN_DECISION"] == "gave_up"
    assert (
        "stage `warmup` has no complete checkpoint and its target is 9; none of its links has begun"
        in stages.reason
    )
    checkpoints.save(str(stages.from_ckpt), 6, 1, 2)
    append_record(
        str(stages.first / "links.jsonl"),
        {"event": "begin", "mode": "gave_up", "reason": "3 links in a row"},
    )
    assert stages.begin()["HPCTRAIN_DECISION"] == "gave_up"
    assert (
        "stage `warmup` is at 6 and its target is 9; its last link: 3 links in a row"
        in stages.reason
    )
    assert stages.names() == [] and not (stages.second / "hand_over.json").exists()
    checkpoints.save(str(stages.from_ckpt), 9, 1, 2)
    assert stages.begin()["HPCTRAIN_MODE"] == "finetune"  # a link submitted since then tries again


@pytest.mark.parametrize("way", ["symlink", "copy", "hardlink"])
def test_the_newest_complete_checkpoint_is_brought_in_once_and_the_stage_then_goes_its_own_way(
    tmp_path, way
):
    stages = Stages(tmp_path, way)
    for step in (6, 9):
        checkpoints.save(str(stages.from_ckpt), step, 1, 2, lineage="warmup")
    before = checkpoints.snapshot(stages.from_ckpt / "global_step9")
    found = stages.begin()
    assert (found["HPCTRAIN_MODE"], found["HPCTRAIN_ITERATION"]) == ("finetune", "9")
    assert found["HPCTRAIN_CHECKPOINT"] == str(stages.ckpt / "global_step9")
    assert (stages.ckpt / "latest").read_bytes() == b"global_step9"
    assert checkpoints.lineages(stages.ckpt / "global_step9") == {(9, "warmup")}
    shard = "mp_rank_00_model_states.pt"
    here, there = stages.ckpt / "global_step9", stages.from_ckpt / "global_step9"
    assert here.is_symlink() == (way == "symlink")
    if way == "symlink":
        assert os.readlink(here) == "../ck a/global_step9"
    assert (here / shard).samefile(there / shard) == (way != "copy")
    assert any("stage `warmup` hands over" in line for line in stages.said)
    stages.end(1)
    checkpoints.save(str(stages.from_ckpt), 12, 1, 2)  # whatever the stage before does now
    again = stages.begin()
    assert (again["HPCTRAIN_MODE"], again["HPCTRAIN_ITERATION"]) == ("finetune", "9")
    assert stages.names() == ["global_step9", "latest"]
    checkpoints.save(str(stages.ckpt), 3, 1, 2)
    stages.end(1)
    shutil.rmtree(stages.first)
    assert stages.begin()["HPCTRAIN_MODE"] == "resume"
    checkpoints.save(str(stages.ckpt), 5, 1, 2)
    stages.end(0)
    assert stages.begin()["HPCTRAIN_DECISION"] == "done"
    assert checkpoints.snapshot(stages.from_ckpt / "global_step9") == before or way == "hardlink"


@pytest.mark.parametrize("way", ["symlink", "copy", "hardlink"])
def test_a_save_at_the_starts_own_number_never_reaches_the_stage_before(tmp_path, way):
    stages = Stages(tmp_path, way)
    stages.plan(
        stages.second,
        **{**json.loads((stages.second / "plan.json").read_text())["guard"], "target": 20},
    )
    checkpoints.save(str(stages.from_ckpt), 9, 1, 2, lineage="warmup")
    assert stages.begin()["HPCTRAIN_CHECKPOINT"] == str(stages.ckpt / "start-9")
    assert any("its save at 9 would go through it" in line for line in stages.said)
    checkpoints.save(str(stages.ckpt), 9, 1, 2, lineage="own")
    assert checkpoints.lineages(stages.from_ckpt / "global_step9") == {(9, "warmup")}


@pytest.mark.parametrize("way", ["copy", "hardlink"])
def test_a_crash_at_any_write_of_a_copy_leaves_nothing_or_all_of_it(tmp_path, monkeypatch, way):
    stages = Stages(tmp_path, way)
    beside = Path(f"{stages.ckpt}.hpctrain")
    checkpoints.save(str(stages.from_ckpt), 9, 2, 1)

    class Killed(BaseException):
        pass

    for last in range(60):
        shutil.rmtree(stages.ckpt, ignore_errors=True)
        shutil.rmtree(beside, ignore_errors=True)
        left = [last]

        def cut(module, name, patch, left=left):
            real = getattr(module, name)

            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            patch.setattr(module, name, call)

        with monkeypatch.context() as patch:
            for name in ("link", "mkdir", "rename", "replace", "fsync", "utime"):
                cut(os, name, patch)
            cut(copying.shutil, "copyfileobj", patch)
            try:
                stages.begin()
                break
            except Killed:
                pass
        for lock in beside.glob(".hpctrain-lock*"):
            lock.unlink()  # as Slurm would say: the killed one has ended
        if stages.ckpt.exists() and "global_step9" in stages.names():
            assert len(checkpoints.lineages(stages.ckpt / "global_step9")) == 1
            assert len(os.listdir(stages.ckpt / "global_step9")) == 4
        found = stages.begin()
        assert found["HPCTRAIN_MODE"] == "finetune", (last, stages.said)
        assert stages.names() == ["global_step9", "latest"], last
        assert len(os.listdir(stages.ckpt / "global_step9")) == 4
        stages.end(1)
        (stages.second / "links.jsonl").unlink()
    assert last > 5


def test_an_incomplete_newer_checkpoint_is_not_what_is_handed_over(tmp_path):
    stages = Stages(tmp_path, target=6)
    checkpoints.save(str(stages.from_ckpt), 6, 1, 2)
    checkpoints.partial_save(str(stages.from_ckpt), 9, [3, 1], 1, 2)
    assert stages.begin()["HPCTRAIN_ITERATION"] == "6"


def test_without_a_target_the_stage_is_through_when_its_last_link_ended_well(tmp_path):
    stages = Stages(tmp_path, target=None)
    checkpoints.save(str(stages.from_ckpt), 7, 1, 2)
    assert "has not ended with exit code 0" in (stages.begin(), stages.reason)[1]
    append_record(
        str(stages.first / "links.jsonl"), {"event": "end", "mode": "scratch", "exit_code": 0}
    )
    assert stages.begin()["HPCTRAIN_ITERATION"] == "7"


def test_the_forks_counter_refuses_another_number_than_the_planned_one(tmp_path):
    stages = Stages(tmp_path, counter="greatest_folder")
    checkpoints.save(str(stages.from_ckpt), 12, 1, 2)
    assert stages.begin()["HPCTRAIN_DECISION"] == "gave_up"
    assert "planned to count on from 9; render it again" in stages.reason


def test_what_the_recipe_needs_in_the_start_must_be_there(tmp_path):
    stages = Stages(tmp_path, start_needs=["critic"])
    checkpoints.save(str(stages.from_ckpt), 9, 1, 2)
    assert (
        stages.begin()["HPCTRAIN_DECISION"] == "gave_up" and "it has no `critic`" in stages.reason
    )


def verl(folder: Path, step: int, world: int) -> None:
    for rank in range(world):
        for role in ("actor", "critic"):
            for kind in ("model", "optim", "extra_state"):
                path = (
                    folder
                    / f"global_step_{step}"
                    / role
                    / f"{kind}_world_size_{world}_rank_{rank}.pt"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(checkpoints.torch_file({"step": step}))
    (folder / f"global_step_{step}" / "actor" / "huggingface").mkdir()
    (folder / f"global_step_{step}" / "actor" / "huggingface" / "config.json").write_text("{}")
    (folder / f"global_step_{step}" / "data.pt").write_bytes(checkpoints.torch_file({"step": step}))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


@pytest.mark.parametrize(("world", "decision"), [(2, "run"), (4, "gave_up")])
def test_verls_checkpoint_with_actor_critic_and_data_for_the_same_world_size(
    tmp_path, world, decision
):
    stages = Stages(
        tmp_path, "copy", target=2204, layout="verl", start_needs=["critic"], data_parallel=world
    )
    stages.plan(
        stages.second,
        **{**json.loads((stages.second / "plan.json").read_text())["guard"], "target": 4408},
    )
    verl(stages.from_ckpt, 2204, 2)
    found = stages.begin()
    assert found["HPCTRAIN_DECISION"] == decision
    if decision == "run":
        assert (found["HPCTRAIN_MODE"], found["HPCTRAIN_ITERATION"]) == ("finetune", "2204")
        assert stages.names() == ["global_step_2204", "latest_checkpointed_iteration.txt"]
        assert (stages.ckpt / "latest_checkpointed_iteration.txt").read_bytes() == b"2204"
        assert (
            stages.ckpt / "global_step_2204" / "actor" / "huggingface" / "config.json"
        ).read_text() == "{}"
        stages.end(1)
        verl(stages.ckpt, 2304, 2)
        assert stages.begin()["HPCTRAIN_ITERATION"] == "2304"
    else:
        assert "was saved by 2 ranks, and the plan has 4" in stages.reason


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "index", "index cut", "index gap", "none", "no config"]
)
def test_a_model_is_taken_when_it_is_whole(tmp_path, weights):
    stages = Stages(tmp_path, hand_over="model")
    checkpoints.save(str(stages.from_ckpt), 9, 1, 2)
    model = tmp_path / "model"
    model.mkdir()
    if weights != "no config":
        (model / "config.json").write_text("{}")
    if weights.startswith("index"):
        text = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
        (model / "model.safetensors.index.json").write_text(
            text[: 20 if weights == "index cut" else None]
        )
        (model / "model-1.safetensors").touch()
        if weights != "index gap":
            (model / "model-2.safetensors").touch()
    elif weights != "none":
        (model / "model.safetensors").touch()
    found = stages.begin()
    good = weights in ("model.safetensors", "index")
    assert (found["HPCTRAIN_DECISION"], found["HPCTRAIN_MODE"]) == (
        ("run", "scratch") if good else ("gave_up", "")
    )
    assert good or "stage `warmup`" in stages.reason
    assert not stages.ckpt.exists() or stages.names() == []


def test_a_handed_over_start_is_what_the_other_verbs_see(tmp_path):
    stages = Stages(tmp_path)
    assert read_settings(str(stages.second)).start is None
    checkpoints.save(str(stages.from_ckpt), 9, 1, 2)
    stages.begin()
    assert read_settings(str(stages.second)).start == str(stages.from_ckpt / "global_step9")
