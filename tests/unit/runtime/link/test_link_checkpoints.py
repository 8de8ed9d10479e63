"""Which checkpoint a link takes when the folder is not as a clean save leaves it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import checkpoints
import pytest

from hpctrain.jobs import checkpoints as jobs_checkpoints
from hpctrain.runtime.settings import read_settings


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@pytest.mark.parametrize(
    "text", ["", "\n", "global_step999", "../base/global_step50", "\0\0\0", "global_step20"]
)
def test_a_bad_latest_falls_back_to_the_newest_complete(quick, text):
    quick.save(10)
    quick.save(20)
    os.unlink(quick.ckpt / "global_step20" / "mp_rank_00_model_states.pt")
    (quick.ckpt / "latest").write_text(text)
    found = quick.begin(1)
    assert (found["mode"], found["iteration"]) == ("resume", "10")
    assert (quick.ckpt / "latest").read_text() == "global_step10"
    assert sorted(os.listdir(quick.ckpt)) == ["global_step10", "latest"]
    assert visible(quick.aside) == ["interrupted-global_step20"]
    assert quick.records()[0]["reason"].count("latest")


def test_a_missing_latest_falls_back(quick):
    quick.save(10)
    os.unlink(quick.ckpt / "latest")
    assert quick.begin(1)["mode"] == "resume"


def test_shards_of_an_interrupted_save_never_mix_with_those_of_the_next(quick):
    quick.save(10)
    checkpoints.partial_save(str(quick.ckpt), 20, [6, 1], 1, 2, lineage="first")
    quick.begin(1)
    checkpoints.partial_save(str(quick.ckpt), 20, [0, 3], 1, 2, lineage="second")
    # the two halves would have looked like one whole
    assert quick.begin(2, job="8")["iteration"] == "10"
    assert {"interrupted-global_step20", "interrupted-global_step20.2"} <= set(
        os.listdir(quick.aside)
    )


def test_a_save_cut_off_before_latest_is_not_lost(quick):
    quick.save(10)
    text = (quick.ckpt / "latest").read_text()
    before = os.stat(quick.ckpt / "latest")
    quick.save(20)
    (quick.ckpt / "latest").write_text(text)
    os.utime(quick.ckpt / "latest", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert quick.begin(1)["iteration"] == "20"


def test_a_latest_that_passes_over_a_newer_complete_checkpoint_is_asked_about_and_nothing_moves(
    quick,
):
    quick.save(10)
    quick.save(20)
    (quick.ckpt / "latest").write_text("global_step10")
    before = checkpoints.snapshot(str(quick.ckpt))
    assert quick.begin(1)["decision"] == "gave_up"
    reason = quick.records()[-1]["reason"]
    assert "--to global_step10` goes back" in reason and "--to global_step20` it goes on" in reason
    assert checkpoints.snapshot(str(quick.ckpt)) == before


def test_who_went_back_with_the_verb_is_obeyed_and_the_newer_ones_are_kept_aside(quick):
    quick.save(10)
    quick.save(20)
    settings = read_settings(str(quick.dir))
    use = jobs_checkpoints.plan_use(settings, to="global_step10")
    jobs_checkpoints.do_use(settings, replace(use, asides=()))
    assert quick.begin(1)["iteration"] == "10"  # cut off in the middle: the link does the rest
    assert visible(quick.aside) == ["acts.jsonl", "aside-global_step20"]
    assert not (quick.ckpt / "global_step20").exists()


def test_what_was_set_aside_can_be_gone_back_to(quick):
    quick.save(10)
    quick.save(20)
    settings = read_settings(str(quick.dir))
    jobs_checkpoints.do_use(settings, jobs_checkpoints.plan_use(settings, to="10"))
    jobs_checkpoints.do_use(settings, jobs_checkpoints.plan_use(settings, to="aside-global_step20"))
    assert quick.begin(1)["iteration"] == "20"
    assert sorted(os.listdir(quick.ckpt)) == ["global_step10", "global_step20", "latest"]


def test_a_latest_that_names_nothing_does_not_reach_a_run_from_scratch(quick):
    quick.ckpt.mkdir()
    (quick.ckpt / "latest").write_text("global_step9")
    assert quick.begin(1)["mode"] == "scratch"
    assert (quick.aside / "aside-latest").exists() and not (quick.ckpt / "latest").exists()


def test_the_forks_counter_sees_only_the_chosen_checkpoint(quick):
    quick.base()
    quick.write_plan(counter="greatest_folder", target=350)
    quick.begin(1)
    assert os.readlink(quick.ckpt / "global_step50")
    quick.save(60)
    checkpoints.partial_save(str(quick.ckpt), 70, [3, 0], 1, 2)
    os.symlink("../base/global_step50", quick.ckpt / "global_step999")
    assert quick.begin(2, job="8")["iteration"] == "60"
    seen = [name for name in os.listdir(quick.ckpt) if "global_step" in name]
    assert sorted(seen) == ["global_step50", "global_step60"]
    shutil.copytree(quick.ckpt / "global_step60", quick.ckpt / "global_step65_bak")
    # it is the user's: only they may move it
    assert quick.begin(3, job="9")["decision"] == "gave_up"
    assert "`global_step65_bak`" in quick.records()[-1]["reason"]
    assert (quick.ckpt / "global_step65_bak").is_dir()


def test_made_tells_a_side_job_whether_its_link_made_a_checkpoint(quick):
    quick.begin(1)
    quick.save(10)
    quick.end(1)
    assert quick.call("made", "--link", 1).stdout == f"{quick.ckpt}/global_step10\n"
    quick.begin(2, job="8")  # killed without an end
    assert quick.call("made", "--link", 2).returncode == 1
    quick.save(20)
    assert quick.call("made", "--link", 2).stdout == f"{quick.ckpt}/global_step20\n"
    quick.begin(3, job="9")
    assert quick.call("made", "--link", 2).stdout == f"{quick.ckpt}/global_step20\n"
    assert quick.call("made", "--link", 3).returncode == 1


def test_watch_returns_when_a_checkpoint_was_made_after_the_stop_file_was_seen(quick):
    quick.save(10)
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-B",
            str(quick.dir / "runtime" / "__main__.py"),
            "watch",
            "--run-dir",
            str(quick.dir),
            "--every",
            "0.1",
        ]
    )
    try:
        quick.save(20)
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(1)
        (quick.dir / "STOP").touch()
        checkpoints.partial_save(str(quick.ckpt), 30, [3, 0], 1, 2)
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(1)
        for step in range(30, 300, 10):  # it may have begun to look late
            quick.save(step)
            with contextlib.suppress(subprocess.TimeoutExpired):
                watcher.wait(2)
                break
        assert watcher.returncode == 0
    finally:
        watcher.kill()
    quick.write_plan(layout="none")
    assert quick.call("watch").returncode == 1
