"""The mistakes that people really made with these runs: each happens without the guard, and does
not with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import checkpoints
import neox
import pytest

from hpctrain.runtime import link as guard
from hpctrain.runtime.files import read_records


class Chain:
    """A chain of links of the simulated NeoX: the seed's way, `finetune` fixed in the YAML, or with
    the guard's decision."""

    def __init__(
        self, top: Path, guarded: bool, number=50, target=40, planned=True, **neox_options
    ):
        self.guarded, self.dir, self.ckpt = guarded, top / "run", str(top / "ck")
        self.start = neox.start(str(top / "base"), number)
        self.options = {"save_every": 10, "budget": 15, "train_iters": target, **neox_options}
        self.links: list[dict] = []
        self.base = checkpoints.snapshot(top / "base")
        self.top = top
        self.dir.mkdir()
        offset = self.options.get("offset", 0)
        (self.dir / "plan.json").write_text(
            json.dumps(
                {
                    "guard": {
                        "schema_version": 1,
                        "run": "ft",
                        "layout": "deepspeed",
                        "checkpoint_dir": self.ckpt,
                        "start": self.start,
                        "target": target + offset,
                        "give_up_after": 3,
                        "counter": "greatest_folder" if offset else "latest",
                        "retention": neox_options.get("keep_last_n") is not None and planned,
                    }
                }
            )
        )
        os.mkdir(self.ckpt)
        if not guarded:  # as the seed describes
            os.symlink(f"../base/global_step{number}", f"{self.ckpt}/global_step{number}")
            Path(self.ckpt, "latest").write_text(f"global_step{number}")

    def run(self, finetune: bool) -> str:
        """One link; `finetune` is what a person wrote into the YAML, which the guarded chain does
        not ask."""
        number = len(self.links) + 1
        environ = {"SLURM_JOB_ID": str(number)}
        if self.guarded:
            found = guard.begin(str(self.dir), number, environ, lambda text: None)
            if found["HPCTRAIN_DECISION"] != "run":
                return found["HPCTRAIN_DECISION"]
            finetune = found["HPCTRAIN_MODE"] == "finetune"
        try:
            self.links.append(neox.train(self.ckpt, finetune, lineage=str(number), **self.options))
        except OSError as error:
            self.links.append(
                {"rc": 1, "error": str(error), "iterations": 0, "random_weights": False}
            )
        if self.guarded:
            guard.end(str(self.dir), self.links[-1]["rc"], environ, lambda text: None)
        return "run"

    @property
    def base_changed(self) -> bool:
        return checkpoints.snapshot(self.top / "base") != self.base

    @property
    def reason(self) -> str:
        return read_records(str(self.dir / "links.jsonl"))[-1]["reason"]


@pytest.fixture(params=["without", "with"])
def guarded(request):
    return request.param == "with"


def test_five_jobs_with_finetune_true(tmp_path, guarded):
    """Each link threw away the optimizer and the iterations of the one before it."""
    chain = Chain(tmp_path, guarded)
    said = [chain.run(finetune=True) for _ in range(5)]
    if guarded:
        assert said == ["run", "run", "run", "run", "done"]
        # 40, and 5 again after each of three kills
        assert sum(link["iterations"] for link in chain.links) == 55
        assert chain.links[-1]["optimizer_steps"] == 40
    else:
        assert [link["iteration"] for link in chain.links] == [15] * 5


@pytest.mark.parametrize("text", [None, "", "global_step20"])
def test_a_latest_that_is_missing_empty_or_names_what_is_not_there(tmp_path, guarded, text):
    """NeoX then trains on from random weights, or dies in every link."""
    chain = Chain(tmp_path, guarded)
    chain.run(finetune=True)
    os.unlink(f"{chain.ckpt}/latest")
    if text is not None:
        Path(chain.ckpt, "latest").write_text(text)
    chain.run(finetune=False)
    if guarded:
        assert not chain.links[1]["random_weights"] and chain.links[1]["iteration"] == 25
    else:
        assert chain.links[1]["random_weights"] or chain.links[1]["rc"] == 1


def test_an_exit_interval_that_is_no_multiple_of_the_saves(tmp_path, guarded):
    """Every link exits with 0 before it saved: the chain burns through its links and gets
    nowhere."""
    chain = Chain(tmp_path, guarded, save_every=10, exit_interval=8)
    said = [chain.run(finetune=len(chain.links) == 0) for _ in range(4)]
    if guarded:
        assert said[-1] == "gave_up" and len(chain.links) == 3
        assert "3 links in a row" in chain.reason
    else:
        assert [link["rc"] for link in chain.links] == [0] * 4
        assert checkpoints_of(chain) == []


@pytest.mark.parametrize("number", [35, 50])
def test_keep_last_n_checkpoints_1_beside_the_link_to_a_greater_start(tmp_path, guarded, number):
    """Upstream counts from 0, so the link is the newest by name, and every new checkpoint is
    deleted as it is saved."""
    chain = Chain(tmp_path, guarded, number=number, keep_last_n=1)
    for link in range(5):
        chain.run(finetune=link == 0)
    if guarded:
        assert checkpoints_of(chain) == ["global_step40"]
    elif number == 50:
        assert checkpoints_of(chain) == []
    assert not chain.base_changed


def test_retention_that_the_plan_does_not_know_of_does_not_burn_the_whole_chain(tmp_path):
    """`check` refuses keep_last_n_checkpoints: 1; a program that deletes on its own account is
    given up on in time."""
    chain = Chain(tmp_path, guarded=True, keep_last_n=1, planned=False)
    assert [chain.run(finetune=False) for _ in range(4)] == ["run", "run", "run", "gave_up"]
    assert "3 links in a row" in chain.reason and not chain.base_changed


@pytest.mark.parametrize("keep_last_n", [None, 1])
def test_train_iters_below_the_loaded_step_overwrites_the_start_through_its_link(
    tmp_path, guarded, keep_last_n
):
    """`finetune: false` on a new folder: no step is trained, and the final save goes through the
    link into the base."""
    chain = Chain(tmp_path, guarded, number=50, target=40, keep_last_n=keep_last_n)
    chain.run(finetune=False)
    assert chain.base_changed == (not guarded)
    if guarded:
        assert chain.links[0]["iterations"] == 15


def test_a_finetune_that_reaches_the_starts_own_number_saves_through_its_link(tmp_path, guarded):
    chain = Chain(tmp_path, guarded, number=20, target=40, budget=30)
    chain.run(finetune=True)
    assert chain.base_changed == (not guarded)


def test_a_half_saved_folder_desynchronises_the_forks_counter(tmp_path, guarded):
    chain = Chain(tmp_path, guarded, number=50, target=40, offset=50)
    chain.run(finetune=True)
    checkpoints.partial_save(chain.ckpt, 70, [2], 1, 1, 0)  # the save at offset + 20 was cut off
    Path(chain.ckpt, "latest").write_text("global_step70" if not guarded else "")
    if guarded:
        assert chain.run(finetune=False) == "run"
        kept = os.listdir(f"{chain.ckpt}.hpctrain")
        assert chain.links[1]["iteration"] == 25 and "interrupted-global_step70" in kept
    else:
        with pytest.raises(Exception, match="zip"):  # noqa: B017
            chain.run(finetune=False)


def test_a_finished_run_is_not_run_again(tmp_path, guarded):
    """The fork's own notes: extra queued jobs load, evaluate and save the last checkpoint again."""
    chain = Chain(tmp_path, guarded, budget=100)
    chain.run(finetune=True)
    newest = checkpoints.snapshot(f"{chain.ckpt}/global_step40")
    said = chain.run(finetune=False)
    assert (checkpoints.snapshot(f"{chain.ckpt}/global_step40") == newest) == guarded
    assert said == ("done" if guarded else "run")


def checkpoints_of(chain):
    return sorted(
        name
        for name in os.listdir(chain.ckpt)
        if name.startswith("global_step") and not os.path.islink(f"{chain.ckpt}/{name}")
    )


def test_the_simulated_neox_deletes_like_the_real_one(tmp_path):
    """Retention meets the link as the oldest: rmtree refuses, the job dies after the save (seen
    with upstream)."""
    chain = Chain(tmp_path, guarded=False, number=5, keep_last_n=1)
    chain.run(finetune=True)
    assert chain.links[0]["rc"] == 1 and "symbolic link" in chain.links[0]["error"]
    shutil.rmtree(tmp_path / "run")
