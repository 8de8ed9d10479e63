"""What the job script says, option by option."""

from __future__ import annotations

import pytest

SAVES = {
    "recipe_options": {"argv": ["true"], "signal": True, "layout": "dcp"},
    "checkpoint": {"dir": "/ck"},
}


@pytest.mark.parametrize(
    ("time", "lead"),
    [("2h", 60), ("4m", 60), ("239s", 59), ("2m", 30), ("100s", 25), ("5s", 1)],  # a quarter of it
)
def test_the_notice_comes_a_minute_before_the_limit_or_a_quarter_of_a_short_job(
    planned, time, lead
):
    found = planned({"time": time})
    value, reason = found.decided["signal"]
    assert value == f"B:USR1@{lead}" == found.sbatch["signal"] and found.errors == []
    assert ("a quarter of this short job" in reason) == (lead < 60)
    assert found.plan.signal == {
        "name": "USR1",
        "lead_s": lead,
        "forward": False,
        "passed_by": None,
    }


@pytest.mark.parametrize(
    ("text", "signal"),
    [
        ("B:USR2@300", ("USR2", 300)),
        ("SIGTERM@10", ("TERM", 10)),
        ("HUP", ("HUP", 60)),
        ("INT@65535", ("INT", 65535)),
    ],
)
def test_a_signal_of_ones_own(planned, text, signal):
    found = planned({"sbatch": {"signal": text}, "time": "1-00:00:00"})
    assert (found.plan.signal["name"], found.plan.signal["lead_s"]) == signal and found.errors == []
    assert found.sbatch["signal"] == f"B:{signal[0]}@{signal[1]}"


@pytest.mark.parametrize("text", ["KILL@5", "USR1@65536", "USR1@x", "R:USR1@5", "usr1", "9@60"])
def test_a_signal_that_is_none_is_refused(planned, text):
    assert (
        "B:USR1@300"
        in planned({"sbatch": {"signal": text}}).problem(f"`signal: {text}` is not").hint
    )


def test_a_signal_before_the_job_begins_is_refused(planned):
    assert planned({"sbatch": {"signal": "USR1@7200"}}).problem(
        "the signal would come 7200 s before the end"
    )
    assert planned({"sbatch": {"signal": "USR1@7199"}}).errors == []


def test_every_directive_of_a_plain_job(planned):
    found = planned({"partition": "small-g", "account": "acc"}, {"slurm": {"requeue": True}})
    run_dir = found.plan.run_dir
    assert found.sbatch == {
        "job-name": "r",
        "account": "acc",
        "partition": "small-g",
        "nodes": "2",
        "ntasks-per-node": "8",
        "cpus-per-task": "7",
        "gres": "gpu:mi250:8",
        "mem": "480G",
        "exclusive": "",
        "time": "02:00:00",
        "signal": "B:USR1@60",
        "requeue": "",
        "open-mode": "append",
        "chdir": run_dir,
        "output": f"{run_dir}/logs/r-%j.out",
    }


@pytest.mark.parametrize(
    ("request_", "option", "value"),
    [
        ("gres", "gres", "gpu:mi250:8"),
        ("gpus-per-node", "gpus-per-node", "8"),
        ("none", None, None),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants_it(planned, request_, option, value):
    found = planned(site={"slurm": {"gpu_request": request_}})
    assert found.sbatch.get(option) == value
    assert {"gres", "gpus-per-node"} & set(found.sbatch) == ({option} if option else set())
    untyped = planned(
        site={"slurm": {"gpu_request": "gres"}, "node_types": {"g": {"gpu_type": ""}}}
    )
    assert untyped.sbatch["gres"] == "gpu:8"
    assert "gres" not in planned({"gpus_per_node": 0, "partition": "small-g"}).sbatch


def test_a_qos_a_hint_and_a_constraint_of_the_site(planned):
    site = {
        "slurm": {"hint": "nomultithread", "constraint": "fast"},
        "partitions": {"small-g": {"qos": "normal"}},
    }
    found = planned({"partition": "small-g"}, site)
    assert (found.sbatch["hint"], found.sbatch["constraint"], found.sbatch["qos"]) == (
        "nomultithread",
        "fast",
        "normal",
    )


def test_a_job_is_put_back_into_the_queue_unless_site_or_run_say_otherwise(planned):
    assert "requeue" in planned(site={"slurm": {"requeue": True}}).sbatch
    for run, requeue in (({"sbatch": {"no-requeue": True}}, True), ({}, False)):
        found = planned(run, {"slurm": {"requeue": requeue}}).sbatch
        assert "no-requeue" in found and "requeue" not in found


def test_the_runs_options_win_over_the_sites_and_the_plans(planned):
    site = {"slurm": {"always": {"nice": 5, "comment": "x"}}}
    run = {
        "sbatch": {
            "nice": 7,
            "comment": None,
            "reservation": "res",
            "mem-per-cpu": "2G",
            "exclusive": False,
        }
    }
    found = planned(run, site)
    assert (found.sbatch["nice"], found.sbatch["reservation"], found.sbatch["mem-per-cpu"]) == (
        "7",
        "res",
        "2G",
    )
    assert "mem" not in found.sbatch and "exclusive" not in found.sbatch
    assert found.decided["sbatch.nice"] == (7, "as the run says")
    assert planned(site=site).decided["sbatch.nice"] == (5, "the site's rule")


def test_an_account_where_the_site_needs_one(planned):
    site = {"account": {"required": True, "pattern": "p_[0-9]+", "example": "p_1"}}
    assert "`account: p_1`" in planned(site=site).problem("site `mine` needs an account").hint
    assert (
        "accounts look like p_1"
        in planned({"account": "q"}, site).problem("`account: q` is not an account").why
    )
    assert planned({"account": "p_22"}, site).sbatch["account"] == "p_22"
    assert planned({"account": "p_22x"}, site).errors != []
    assert "account" not in planned().sbatch and planned().errors == []


def test_the_steps_options_are_the_sites(planned):
    rules = {"kill_on_bad_exit": True, "wait_s": 60, "extra": ["--mpi=pmi2", "--label"]}
    found = planned(site={"slurm": {"srun": rules}})
    assert found.srun == {
        "kill-on-bad-exit": "1",
        "wait": "60",
        "cpu-bind": "mask_cpu:0xfe",
        "mpi": "pmi2",
        "label": "",
    }
    off = {"kill_on_bad_exit": False, "wait_s": 0}
    assert planned(site={"slurm": {"srun": off}}).srun == {"cpu-bind": "mask_cpu:0xfe"}


@pytest.mark.parametrize(
    "run",
    [{"gpus_per_node": 4}, {"sbatch": {"cpus-per-task": 6}}, {"sbatch": {"exclusive": False}}],
)
def test_a_mask_is_for_whole_nodes_of_just_that_shape(planned, run):
    assert "cpu-bind" not in planned(run).srun


def test_variables_of_site_recipe_and_run_win_in_that_order(planned):
    site = {
        "env": {
            "A": {"value": "1", "why": "w"},
            "B": {"value": "1", "why": "b", "from_nodes": {2: "2", 16: "16"}},
        },
        "node_dirs": {"CACHE": {"path": "{tmp}/x", "why": "small files"}},
    }
    found = planned({"env": {"A": "9", "C": "3", "CACHE": "/x"}}, site)
    env = {variable.name: (variable.value, variable.why) for variable in found.plan.env}
    assert env["A"] == ("9", "from run.yaml, instead of 1")
    assert env["B"] == ("2", "b") and env["C"] == ("3", "from run.yaml")
    assert found.decided["env.B"] == ("2", "b")
    assert "the site's wins" in found.problem("`env.CACHE` is a folder", "warning").why
    assert dict((v.name, v.value) for v in planned({"nodes": 1}, site).plan.env)["B"] == "1"
    assert (
        dict((v.name, v.value) for v in planned({"nodes": 16, "time": "1h"}, site).plan.env)["B"]
        == "16"
    )
    same = {variable.name: variable.why for variable in planned({"env": {"A": "1"}}, site).plan.env}
    assert same["A"] == "w"


def test_a_container_binds_what_the_job_needs_and_no_more(planned):
    site = {
        "container": {"runtime": "apptainer", "gpu_flag": "--rocm", "binds": ["/scratch", "/a:/b"]}
    }
    run = {
        "container": "/images/x.sif",
        "container_binds": ["/extra"],
        "checkpoint": {"dir": "/scratch/ck", "start": "/models/base/start"},
        "data": {"train": ["/data/set/part"]},
        "recipe_options": {"argv": ["true"], "layout": "dcp"},
    }
    found = planned(run, site)
    assert found.errors == []
    argv = list(found.plan.container)
    assert argv[:3] == ["apptainer", "exec", "--rocm"] and argv[-1] == "/images/x.sif"
    binds = [argv[index + 1] for index, word in enumerate(argv) if word == "--bind"]
    # The run directory lies in /tmp, which is there anyway.
    assert binds == ["/scratch", "/a:/b", "/extra", "/models/base", "/data/set"]


def test_containers_that_cannot_be_are_refused(planned):
    assert planned({"container": "/x.sif"}, {"container": {"runtime": "none"}}).problem(
        "runs no containers"
    )
    site = {"container": {"runtime": "apptainer"}}
    assert planned({"container": "/x:y.sif"}, site).problem("cannot hold `:` or `,`")
    assert planned({"container_binds": ["/a"]}, site).problem(
        "`container_binds` without a `container`"
    )
    data = {"container": "/x.sif", "data": {"train": ["/da:ta/part"]}}
    assert planned(data, site).problem("the data `/da:ta` cannot be bound")
    assert planned({}, site).plan.container == ()


@pytest.mark.parametrize(
    ("asked", "site", "policy"),
    [
        (True, {"requeue": True}, "exclude"),
        (True, {"requeue": False}, "warn"),
        ({"policy": "stop"}, {"requeue": False}, "stop"),
    ],
)
def test_what_a_preflight_does_with_bad_nodes(planned, asked, site, policy):
    found = planned({"preflight": asked}, {"slurm": site})
    assert found.plan.preflight["policy"] == policy and found.errors == []
    assert (found.plan.preflight["gpus_per_task"], found.plan.preflight["tasks_per_node"]) == (1, 8)


def test_a_preflight_that_cannot_be_is_refused(planned):
    fixed = {"slurm": {"requeue": False}}
    assert planned({"preflight": {"policy": "exclude"}}, fixed).problem("`no-requeue` forbids that")
    assert planned({"preflight": {"limit_s": 7200}}).problem("does not fit into a job of 7200 s")
    assert planned({"preflight": {"limit_s": 7199}}).errors == []
    assert planned().plan.preflight is None
    cpu = {"preflight": True, "gpus_per_node": None, "partition": "cpu"}
    assert planned(cpu).plan.preflight["gpus_per_task"] is None
