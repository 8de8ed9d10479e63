"""Where a run goes and with what shape."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("run", "partition", "others"),
    [
        # The smallest that fits; among equals the one for short jobs; never one for tests.
        ({"nodes": 2, "time": "1h"}, "quick-g", "small-g, large-g would fit too"),
        ({"nodes": 4, "time": "60m"}, "quick-g", "small-g, large-g"),
        ({"nodes": 4, "time": "61m"}, "small-g", "large-g"),
        ({"nodes": 2, "time": "3-00:00:00"}, "small-g", ""),
        ({"nodes": 5, "time": "2h"}, "large-g", ""),
        ({"nodes": 7, "time": "1h"}, "large-g", ""),
        ({"nodes": 8, "time": "1h"}, "wide-g", "large-g"),
        ({"nodes": 64, "time": "1h"}, "wide-g", "large-g"),
        ({"nodes": 65, "time": "1h"}, "large-g", ""),
        ({"nodes": 1024, "time": "2-00:00:00"}, "large-g", ""),
        ({"nodes": 2, "gpus_per_node": None}, "cpu", ""),
    ],
)
def test_the_smallest_partition_that_fits_is_picked(planned, run, partition, others):
    found = planned(run)
    value, reason = found.decided["partition"]
    assert (value, found.plan.partition.name) == (partition, partition) and found.errors == []
    assert (
        "the smallest that fits" in reason
        and others in reason
        and ("would fit" in reason) == bool(others)
    )


def test_when_none_fits_every_limit_is_told(planned):
    problem = planned({"nodes": 2000}).problem(
        "no partition of `mine` fits 2000 nodes for 02:00:00"
    )
    assert "large-g: up to 1024 nodes, 2-00:00:00, 8 GPUs a node" in problem.why
    assert "dev-g: up to 32 nodes, 03:00:00, 8 GPUs a node, debug" in problem.why
    assert "cpu: up to 512 nodes, 2-00:00:00, CPU only" in problem.why
    assert ":6:" in problem.where or ":5:" in problem.where  # `nodes:`


def test_when_none_fits_each_partition_says_why(planned):
    problem = planned({"nodes": 600, "time": "1h", "gpus_per_node": None}).problem(
        "no partition of `mine` fits 600"
    )
    lines = dict(line.split(": ", 1) for line in problem.why.splitlines())

    assert lines["large-g"].endswith(": it has GPUs, and the run asks for none")
    assert lines["cpu"].endswith(": 600 nodes are too many")
    assert lines["dev-g"].endswith(
        ": it has GPUs, and the run asks for none; it is for tests; 600 nodes are too many"
    )
    assert "gpus_per_node" in problem.hint
    assert all(": " in line for line in lines.values())


def test_a_run_without_gpus_takes_a_partition_with_them_where_there_is_no_other(planned):
    found = planned({"gpus_per_node": None, "nodes": 2}, {"partitions": {"cpu": None}})

    assert found.errors == [] and found.decided["partition"][0] == "small-g"


def test_a_partition_that_is_not_there_names_the_nearest(planned):
    assert (
        "did you mean `small-g`?"
        in planned({"partition": "smal-g"}).problem("no partition `smal-g`").hint
    )


def test_a_named_partition_is_taken_even_for_tests(planned):
    found = planned({"partition": "dev-g"})
    assert found.decided["partition"] == ("dev-g", "as the run says") and found.errors == []


def test_a_site_without_partitions_leaves_the_choice_to_slurm(planned):
    empty = dict.fromkeys(["large-g", "small-g", "dev-g", "quick-g", "wide-g", "cpu"])
    found = planned(site={"partitions": empty, "default_node_type": "g"})
    assert found.plan.partition.name == "" and "partition" not in found.sbatch
    assert "default partition" in found.decided["partition"][1] and found.plan.node_type.name == "g"


@pytest.mark.parametrize(
    ("run", "shape"),
    [
        ({}, (8, 8, 7)),
        ({"gpus_per_node": 1}, (1, 1, 7)),
        ({"gpus_per_node": 3}, (3, 3, 7)),
        # Eight tasks on the eight cores of one GPU's share and a bit: one each, and never none.
        (
            {"gpus_per_node": 1, "recipe_options": {"argv": ["true"]}, "tasks_per_node": 1},
            (1, 1, 7),
        ),
        ({"gpus_per_node": None, "partition": "cpu"}, (0, 16, 8)),
        ({"gpus_per_node": None, "partition": "cpu", "tasks_per_node": 128}, (0, 128, 1)),
        ({"gpus_per_node": None, "partition": "cpu", "tasks_per_node": 3}, (0, 3, 42)),
        ({"gpus_per_node": None, "partition": "cpu", "sbatch": {"ntasks-per-node": 4}}, (0, 4, 32)),
        ({"sbatch": {"cpus-per-task": 5}}, (8, 8, 5)),
    ],
)
def test_gpus_tasks_and_cpus_of_a_node(planned, run, shape):
    plan = planned(run).plan
    assert (
        plan.gpus_per_node,
        plan.tasks_per_node,
        plan.cpus_per_task,
    ) == shape and plan.errors == []


def test_a_node_with_one_core_a_task_is_full_and_not_too_small(planned):
    """8 tasks on 8 cores are one core each; at least one, and not two, is what a task needs."""
    nodes = {"c": {"cores": 8, "tasks_per_node": 8}}
    plan = planned({"gpus_per_node": None, "partition": "cpu"}, {"node_types": nodes}).plan
    assert (plan.tasks_per_node, plan.cpus_per_task) == (8, 1) and plan.errors == []


def test_more_tasks_than_cores_are_refused_with_what_fits(planned):
    run = {"gpus_per_node": None, "partition": "cpu", "tasks_per_node": 129}
    problem = planned(run).problem("129 tasks x 1 cpus = 129 cores a node")
    assert "has 128 usable ones" in problem.what and "at most `cpus-per-task: 1`" in problem.hint
    problem = planned({"sbatch": {"cpus-per-task": 8}}).problem(
        "8 tasks x 8 cpus = 64 cores a node"
    )
    assert (
        "at most `cpus-per-task: 7` with 8 tasks" in problem.hint
        and "(8 of 64 cores are reserved)" in problem.why
    )


@pytest.mark.parametrize("value", [0, "x", True, "-1", "1.5"])
@pytest.mark.parametrize("option", ["ntasks-per-node", "cpus-per-task"])
def test_what_is_no_number_is_refused(planned, option, value):
    words = {
        "ntasks-per-node": "is not a number of tasks",
        "cpus-per-task": "is not a number of cpus",
    }
    assert planned({"sbatch": {option: value}}).problem(words[option])


def test_more_gpus_than_a_node_has_are_refused(planned):
    found = planned({"gpus_per_node": 9})
    assert found.problem("`gpus_per_node: 9` is more than a `g` node has (8)")
    assert found.plan.gpus_per_node == 8
    assert planned({"gpus_per_node": 8}).errors == []


def test_all_gpus_unless_the_run_or_a_site_without_gpu_requests_says_otherwise(planned):
    found = planned({"gpus_per_node": None, "partition": "large-g"})
    assert (
        found.decided["gpus_per_node"] == (8, "all of a `g` node")
        and found.plan.tasks_per_node == 8
    )
    assert planned().decided["gpus_per_node"] == (8, "as the run says")
    bare = planned(
        {"gpus_per_node": None, "partition": "large-g"}, {"slurm": {"gpu_request": "none"}}
    )
    assert bare.plan.gpus_per_node == 0


@pytest.mark.parametrize(
    ("run", "site", "mem", "exclusive"),
    [
        ({}, {}, "480G", True),  # all GPUs of a node: the node is the job's
        ({"gpus_per_node": 2}, {}, "120G", False),
        ({"gpus_per_node": None, "partition": "cpu", "tasks_per_node": 1}, {}, "224G", False),
        ({"gpus_per_node": 2, "sbatch": {"exclusive": True}}, {}, "480G", True),
        ({"sbatch": {"exclusive": False}}, {}, "480G", False),
        ({"gpus_per_node": 2, "sbatch": {"mem": "7G"}}, {}, "7G", False),
        ({"gpus_per_node": 2, "sbatch": {"mem": 0}}, {}, "0", False),
        ({"gpus_per_node": 2}, {"slurm": {"always": {"exclusive": True}}}, "480G", True),
    ],
)
def test_memory_and_whole_nodes(planned, run, site, mem, exclusive):
    found = planned(run, site)
    assert found.errors == [] and found.sbatch["mem"] == mem
    assert ("exclusive" in found.sbatch) == exclusive


def test_a_share_of_a_cpu_node_gets_its_share_of_memory(planned):
    site = {"partitions": {"cpu": {"whole_nodes": False}}}
    run = {
        "gpus_per_node": None,
        "partition": "cpu",
        "tasks_per_node": 1,
        "sbatch": {"cpus-per-task": 32},
    }
    assert planned(run, site).sbatch["mem"] == "56G"


def test_more_memory_than_a_node_has_is_refused(planned):
    assert planned({"sbatch": {"mem": "481G"}}).problem("is more than a `g` node gives (480 GiB)")
    assert planned({"sbatch": {"mem": "480G"}}).errors == []
    assert planned({"sbatch": {"mem": "much"}}).problem("`sbatch.mem`: ")


def test_a_recipe_with_one_launcher_a_node_or_one_task_a_gpu_keeps_to_it(planned, tmp_path):
    neox = {
        "recipe": "dpo",
        "recipe_options": None,
        "tasks_per_node": 4,
        "config": {"policy_name": "/p"},
    }
    problem = planned(neox).problem("4 tasks a node with 8 GPUs")
    assert "needs one task per GPU" in problem.what and "`gpus_per_node: 4`" in problem.hint
