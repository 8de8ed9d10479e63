"""Launcher keys, environment, tracking, devices."""

import pytest

from .conftest import UPSTREAM

DEEPY = {"launch": "deepy"}
BARE = {"container": None}


def test_srun_starts_train_py_and_neox_keeps_out(neox):
    planned = neox(
        base={
            "deepspeed_slurm": "true",
            "launcher": "pdsh",
            "no_ssh_check": "true",
            "master_port": "9835",
            "hostfile": "/h",
        }
    )
    config, resolved = planned.config("finetune"), planned.plan.resolved

    assert config["launcher"] == "slurm" and config["deepspeed_slurm"] is False
    assert not {"no_ssh_check", "master_port", "hostfile"} & set(config)
    assert (
        resolved.argv == ("python", "-u", "/project/neox/train.py")
        and resolved.workdir == "/project/neox"
    )
    assert "get_deepspeed_main_args" in resolved.files["neox_args.py"]


def test_deepy_gets_the_keys_it_needs(neox):
    planned = neox(options=DEEPY, run=BARE)
    config = planned.config("finetune")

    assert config["deepspeed_slurm"] is True and config["no_ssh_check"] is True
    assert planned.plan.resolved.argv == (
        "python",
        "/project/neox/deepy.py",
        "/project/neox/train.py",
    )
    assert planned.plan.resolved.files == {}
    assert any(path.endswith("deepy.py") for _, path, _ in planned.plan.resolved.paths)


@pytest.mark.parametrize("line", ["launcher: pdsh", "deepspeed_slurm: true", "global_num_gpus: 8"])
def test_launcher_keys_in_the_run_that_contradict_are_refused(neox, line):
    neox(line + "\n").problem("contradicts what hpctrain sets")


@pytest.mark.parametrize("line", ["hostfile: /h", "master_port: 1", "num_nodes: 4", "rank: 0"])
def test_places_in_the_run_are_refused(neox, line):
    neox(line + "\n").problem("is not for a run to set")


@pytest.mark.parametrize(
    "line", ["launcher: slurm", "deepspeed_slurm: false", "num_nodes: -1", "force_multi: false"]
)
def test_keys_in_the_run_that_say_the_same_are_fine(neox, line):
    assert neox(line + "\n").said() == []


def test_deepy_and_a_container_exclude_each_other(neox):
    neox(options=DEEPY).problem("`launch: deepy` does not work with `container`")
    neox(options={"activate": "/env.sh"}).problem("`activate` is for `launch: deepy`")


def test_weights_and_biases(neox):
    assert neox().config("finetune")["use_wandb"] is False
    neox("use_wandb: true\n").problem("no `secrets:` file", "warning")
    neox("use_wandb: true\n", options=DEEPY, run=BARE).problem("shows the key to everyone")
    assert neox("use_wandb: true\n", run={"secrets": "/s.env"}).said("warning") == []


def test_the_forks_attention_mask(neox):
    variables = {v.name: v for v in neox().plan.resolved.env}
    assert (
        variables["CURSE_ATTENTION"].value == "1"
        and "end-of-document" in variables["CURSE_ATTENTION"].why
    )
    assert neox(options=UPSTREAM).plan.resolved.env == ()
    neox(run={"env": '{CURSE_ATTENTION: "0"}'}).problem("see each other", "warning")
    neox(run={"env": '{SFT_ENABLED: "1"}'}).problem("`env.SFT_ENABLED` has no effect", "warning")
    neox(run={"env": '{SAMPLE_ENDS: "1"}'}).problem("experimental", "warning")
    neox(run={"env": '{CURSE_ATTENTION: "1"}'}, options=UPSTREAM).problem(
        "has no effect upstream", "warning"
    )


def test_tasks_must_see_all_gpus(neox):
    assert any(
        "gpus-per-task" in line and "needs all of the node" in line
        for line in neox(run={"sbatch": "{gpus-per-task: 1}"}).said()
    )
    neox(run={"env": '{ROCR_VISIBLE_DEVICES: "0"}'}).problem("hides GPUs")


def test_no_deepspeed_or_autotuning(neox):
    neox("deepspeed: false\n").problem("does not train")
    neox("autotuning: {enabled: true}\n").problem("`autotuning` rewrites")


def test_every_key_has_a_decision(neox):
    planned = neox("log_interval: 5\n")
    named = {d.name for d in planned.plan.decisions}

    assert {f"config.{key}" for key in planned.config("resume")} <= named
    assert "over the base" not in planned.decision("config.log_interval").reason
    overriding = neox("train_iters: 50\n").decision("config.train_iters")
    assert (
        "over the base config's at base.yml:18:1" in overriding.reason
        and overriding.origin == "run.yaml:16:16"
    )
