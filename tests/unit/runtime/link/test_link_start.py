"""How a link begins: from nothing, from a start, or from what was made since; and when it had
better not."""

from __future__ import annotations

import os
import shutil

import checkpoints
import pytest

from hpctrain.runtime.settings import parse_settings
from hpctrain.runtime.survey import start_link, start_number

from .conftest import Run


def test_nothing_there_and_no_start_is_from_scratch(run):
    assert run.begin(1) == {
        "decision": "run",
        "mode": "scratch",
        "checkpoint": "",
        "iteration": "0",
        "link": "1",
    }


def test_a_start_is_bootstrapped_and_finetuned_from_once(run):
    run.write_plan(target=49)
    run.base("_global_step50_backup")
    found = run.begin(1)
    assert found["mode"] == "finetune"
    assert os.readlink(run.ckpt / "global_step50") == "../base/_global_step50_backup"
    assert (run.ckpt / "latest").read_bytes() == b"global_step50"
    assert "`_global_step50_backup` is iteration 50; its link is called `global_step50`" in run.said
    run.save(10)
    run.end(1)
    assert run.begin(2, job="8")["mode"] == "resume"
    assert run.records()[-1]["checkpoint"] == "global_step10"
    assert {**run.records()[1], "time": ""} == {
        "event": "end",
        "link": 1,
        "job_id": "7",
        "restart": 0,
        "mode": "finetune",
        "checkpoint": "global_step10",
        "iteration": 10,
        "exit_code": 1,
        "nodes": "nid[01-02]",
        "reason": "exit code 1",
        "time": "",
    }


def test_made_since_is_not_a_greater_number(run):
    """Upstream NeoX counts from 0 after a finetune: 10 is newer than 50."""
    run.write_plan(target=49)
    run.base()
    run.begin(1)
    run.save(10)
    (run.ckpt / "latest").write_text("global_step50")  # cut off before it was named
    found = run.begin(2, job="8")
    assert (found["mode"], found["iteration"], os.path.basename(found["checkpoint"])) == (
        "resume",
        "10",
        "global_step10",
    )
    assert (run.ckpt / "latest").read_text() == "global_step10"


def test_a_folder_bootstrapped_under_the_other_name_is_taken_as_it_is(quick):
    """An earlier version's link, or a plan that had a greater target then: nothing is made twice,
    nothing is renamed."""
    quick.base()
    assert (
        quick.begin(1)["mode"] == "finetune" and (quick.ckpt / "latest").read_text() == "start-50"
    )
    quick.end(1)
    quick.write_plan(target=49)
    found = quick.begin(2, job="8")
    assert (found["mode"], found["checkpoint"]) == ("finetune", str(quick.ckpt / "start-50"))
    assert sorted(name for name in os.listdir(quick.ckpt) if name[0] != ".") == [
        "latest",
        "start-50",
    ]
    assert (quick.ckpt / "latest").read_text() == "start-50"
    quick.save(10)
    assert quick.begin(3, job="9")["mode"] == "resume"
    assert sorted(os.listdir(quick.ckpt)) == ["global_step10", "latest", "start-50"]


def test_a_harmless_link_keeps_its_name_through_the_whole_run(quick):
    quick.write_plan(target=49)
    quick.base()
    quick.begin(1)
    quick.save(10)
    quick.end(1)
    assert quick.begin(2, job="8")["mode"] == "resume"
    assert sorted(name for name in os.listdir(quick.ckpt) if name[0] != ".") == [
        "global_step10",
        "global_step50",
        "latest",
    ]


def test_a_link_made_by_hand_gets_the_safe_name_before_the_framework_can_stumble_over_it(quick):
    quick.base()
    quick.ckpt.mkdir()
    os.symlink("../base/global_step50", quick.ckpt / "global_step50")
    (quick.ckpt / "latest").write_text("global_step50")
    assert quick.begin(1)["mode"] == "finetune"
    assert (quick.ckpt / "latest").read_text() == "start-50"
    assert "not `global_step50`: the run counts from 0 to 300" in quick.said
    os.rename(quick.ckpt / "start-50", quick.ckpt / "global_step50")
    quick.save(10)
    assert quick.begin(2, job="8")["mode"] == "resume"
    assert sorted(os.listdir(quick.ckpt)) == ["global_step10", "latest"]
    # a link still leads there
    assert os.path.samefile(quick.aside / "aside-global_step50", quick.start)


def test_a_start_never_counts_as_done(quick):
    quick.base()
    quick.write_plan(target=50)
    assert quick.begin(1)["mode"] == "finetune"


def test_a_half_copied_start_is_refused_with_its_reason(quick):
    quick.base()
    os.truncate(quick.start + "/mp_rank_00_model_states.pt", 30)
    found = quick.begin(1)
    assert found["decision"] == "gave_up"
    assert "mp_rank_00_model_states.pt" in quick.records()[0]["reason"]


def test_a_start_of_another_model_shape_is_refused(quick):
    quick.base()
    quick.write_plan(tensor_parallel=2)
    assert quick.begin(1)["decision"] == "gave_up"
    assert "model-parallel" in quick.records()[0]["reason"]


def test_a_start_from_another_number_of_nodes_is_fine(quick):
    quick.base()
    quick.write_plan(data_parallel=16)
    assert quick.begin(1)["mode"] == "finetune"


@pytest.mark.parametrize("with_start", [True, False])
def test_no_start_begins_anew_against_a_record_of_a_finished_checkpoint(tmp_path, with_start):
    run = Run(tmp_path)
    if with_start:
        run.base()
    run.link(1)
    run.save(10)
    run.link(2)
    shutil.rmtree(run.ckpt)
    assert run.begin(3)["decision"] == "gave_up"
    reason = run.records()[-1]["reason"]
    assert "`global_step10` was complete" in reason and "to begin again from" in reason
    (run.dir / "links.jsonl").rename(run.dir / "links.old")
    assert run.begin(3)["mode"] == ("finetune" if with_start else "scratch")


def test_nothing_of_the_start_ever_changes(quick):
    quick.base()
    before = checkpoints.snapshot(quick.start)
    quick.begin(1)
    quick.save(10)
    os.truncate(quick.ckpt / "global_step10" / "mp_rank_00_model_states.pt", 3)
    quick.end()
    quick.begin(2, job="8")
    assert checkpoints.snapshot(quick.start) == before


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("global_step423858", 423858),
        ("_global_step423858_backup", 423858),
        ("_global_step_423858_backup", 423858),
        ("iter_0001000", 1000),
        ("checkpoint-12", 12),
        ("v2_global_step7_b3", 7),
        ("model-7", 7),
        ("v2-7b", None),
        ("final", None),
        ("step_3_step_4", None),
    ],
)
def test_the_iteration_in_a_starts_name(name, number):
    assert start_number("/x/" + name) == number


def test_a_start_without_a_number_is_refused_with_a_hint(quick):
    quick.base("final")
    assert quick.begin(1)["decision"] == "gave_up"
    assert "cannot be read from its name" in quick.records()[0]["reason"]


@pytest.mark.parametrize(
    ("counter", "target", "retention", "name", "why"),
    [
        ("latest", 49, False, "global_step50", ""),
        ("latest", 50, False, "start-50", "its save at 50"),
        ("latest", 1337, False, "start-50", "to 1337"),
        ("latest", None, False, "start-50", "not known"),
        ("latest", 49, True, "start-50", "retention"),
        ("greatest_folder", 1337, True, "global_step50", ""),
        ("greatest_folder", None, False, "global_step50", ""),
    ],
)
def test_the_starts_link_has_the_frameworks_name_unless_that_does_harm(
    counter, target, retention, name, why
):
    guard = {
        "schema_version": 1,
        "layout": "deepspeed",
        "checkpoint_dir": "/c",
        "start": "/b/global_step50",
        "target": target,
        "counter": counter,
        "retention": retention,
    }
    found, said = start_link(parse_settings(guard))
    assert found == name and why in said and bool(why) == bool(said)
