"""Whether a run fits: limits, places, bills, and how often it saves."""

from __future__ import annotations

import pytest

CHECKPOINTS = {
    "recipe_options": {"argv": ["true"], "layout": "dcp"},
    "checkpoint": {"dir": "/ck/r"},
}


def saving(**changes):
    options = {"argv": ["true"], "layout": "dcp", "target_iteration": 1000, "save_every": 100}
    return {**CHECKPOINTS, "recipe_options": options, "estimate": {"step_time_s": 30}, **changes}


@pytest.mark.parametrize(
    ("run", "words", "hint"),
    [
        (
            {"partition": "quick-g", "time": "90m"},
            "is longer than partition `quick-g` allows (01:00:00)",
            "set `time: 01:00:00` and `chain: {jobs: 2}`; partitions that fit: small-g, large-g",
        ),
        (
            {"partition": "small-g", "nodes": 5},
            "`nodes: 5` is more than",
            "partitions that fit: large-g",
        ),
        (
            {"partition": "wide-g", "nodes": 7, "time": "1h"},
            "`nodes: 7` is less than",
            "partitions that fit: large-g",
        ),
    ],
)
def test_a_limit_is_told_with_what_would_fit(planned, run, words, hint):
    problem = planned(run).problem(words)
    assert problem.hint == hint and "site.yaml:" in problem.why


@pytest.mark.parametrize(
    "run",
    [
        {"partition": "quick-g", "time": "60m", "nodes": 4},
        {"partition": "wide-g", "nodes": 8, "time": "1h"},
        {"partition": "wide-g", "nodes": 64, "time": "1h"},
        saving(partition="small-g", chain={"jobs": 5}),
    ],
)
def test_the_limits_themselves_are_allowed(planned, run):
    assert planned(run).errors == []


def test_a_chain_longer_than_one_may_queue_is_refused(planned):
    problem = planned(saving(partition="small-g", chain={"jobs": 6})).problem(
        "a chain of 6 jobs is more"
    )
    assert "(5 submitted jobs a user)" in problem.what and "queue at most 5" in problem.hint


def test_a_partition_for_tests_is_remarked_on(planned):
    assert planned({"partition": "dev-g"}).problem("is for short tests", "note")


def test_a_start_needs_a_folder_to_save_to_that_it_does_not_lie_in(planned, tmp_path):
    start = {"checkpoint": {"start": "/ck/base", "dir": None}}
    assert planned(start).problem("`checkpoint.start` without `checkpoint.dir`")
    inside = saving(checkpoint={"start": "/ck/r/step1", "dir": "/ck/r"})
    assert planned(inside).problem("`checkpoint.start` lies inside `checkpoint.dir`")
    assert planned(saving(checkpoint={"start": "/ck/r", "dir": "/ck/r"})).errors != []
    assert planned(saving(checkpoint={"start": "/ck/r2/step1", "dir": "/ck/r"})).errors == []
    assert planned(saving(checkpoint={"dir": str(tmp_path)})).problem(
        "is the folder of run.yaml itself"
    )


STORAGE = {
    "storage": {
        "home": {"path": "/home/{user}", "holds": ["code"], "quota_gib": 20, "max_files": 100000},
        "scratch": {"path": "/scratch/{account}", "holds": ["checkpoints", "data"]},
    }
}


@pytest.mark.parametrize("path", ["/home", "/home/me/ck"])
def test_checkpoints_and_data_belong_on_large_file_systems(planned, path):
    run = saving(checkpoint={"dir": path}, account="p1", data={"train": [path + "/d"]})
    found = planned(run, STORAGE)
    problem = found.problem("checkpoints do not belong on `home`")
    assert "(20 GiB, 100,000 files)" in problem.why and problem.hint == "use /scratch/p1"
    assert found.problem("data do not belong on `home`", "warning")
    good = saving(checkpoint={"dir": "/scratch/p1/ck"}, data={"train": ["/homes/d"]})
    assert planned(good, STORAGE).errors == []


def test_a_nodes_own_disk_is_gone_with_the_job(planned):
    found = planned(saving(checkpoint={"dir": "/tmp/ck"}), STORAGE)
    assert found.problem("lies on each node's own /tmp", "warning")
    beside = planned(saving(checkpoint={"dir": "/tmpx/ck"}), STORAGE)
    assert not [one for one in beside.plan.problems if "lies on each node" in one.what]


def billed(**billing):
    return {"partitions": {"small-g": {"billing": {"unit": "GPU-hour", **billing}}}}


def test_the_bill_of_a_job_and_of_a_chain(planned):
    found = planned(saving(partition="small-g", chain={"jobs": 3}), billed(per_node_hour=4))
    assert found.decided["cost.job"] == ("16.0 GPU-hours", "4 x 2 nodes x 2 h")
    assert found.decided["cost.chain"] == ("48.0 GPU-hours", "at most, for 3 jobs")
    assert (found.plan.cost.node_hours, found.plan.cost.gpu_hours) == (4, 32)
    one = planned({"partition": "small-g"}, billed(per_node_hour=4)).decided
    assert "cost.job" in one and "cost.chain" not in one
    assert "cost.job" not in planned({"partition": "small-g"}).decided


def test_a_whole_node_costs_all_of_it(planned):
    """One GPU of a node that nobody else gets costs eight."""
    slices = {"per_slice_hour": 1, "slice": {"cores": 7, "memory_gib": 60, "gpus": 1}}
    run = {"partition": "small-g", "nodes": 1, "gpus_per_node": 1, "time": "1h"}
    assert planned(run, billed(**slices)).plan.cost.billed == 1
    whole = planned({**run, "sbatch": {"exclusive": True}}, billed(**slices))
    assert (whole.plan.cost.billed, whole.plan.cost.gpu_hours) == (8, 8)


def test_the_links_that_the_iterations_need_are_counted(planned):
    found = planned(saving(chain={"jobs": 1}))
    # 7200 s hold 240 steps of 30 s, of which 200 are kept: 1000 need 5.
    assert found.decided["chain.links_needed"] == (5, "1000 iterations x 30 s")
    assert "--jobs 5" in found.problem("5 links are needed, and `chain.jobs` queues 1", "note").hint
    assert found.decided["chain.lost_work"][0] == "00:50:00"
    enough = planned(saving(chain={"jobs": 5}))
    assert not [one for one in enough.plan.problems if "links are needed" in one.what]


def test_a_save_that_no_link_reaches_is_refused(planned):
    options = {"argv": ["true"], "layout": "dcp", "target_iteration": 1000, "save_every": 241}
    problem = planned(saving(recipe_options=options)).problem(
        "a checkpoint every 241 iterations of 30 s never comes"
    )
    assert "02:00:30" in problem.why and problem.hint == "save every 60 iterations or so"
    assert planned(saving(recipe_options={**options, "save_every": 240})).errors == []
    # All of it fits into one link: nothing needs to be saved before the end.
    assert planned(saving(recipe_options={**options, "target_iteration": 240})).errors == []


def test_the_best_interval_by_young_and_daly(planned):
    value, reason = planned(saving()).decided["checkpoint.best_interval"]
    assert "sqrt(2 x 120 s save x 1846 h between failures)" in reason
    assert value == "11:05:38"  # sqrt(2 x 120 x 6,646,154) = 39,938 s
    slow = planned(saving(estimate={"step_time_s": 30, "save_time_s": 480})).decided[
        "checkpoint.best_interval"
    ]
    assert slow[0] == "22:11:16" and "480 s save" in slow[1]
