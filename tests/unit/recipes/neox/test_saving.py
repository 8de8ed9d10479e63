"""Start, save, count, leave: the mistakes that destroy checkpoints or throw work away."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.recipes.neox.saving import Saves
from hpctrain.runtime.settings import parse_settings
from hpctrain.runtime.survey import start_link

from .conftest import UPSTREAM

SCRATCH = {"checkpoint": "{dir: /scratch/run}"}


def start(name, **more):
    return {"checkpoint": f"{{start: /scratch/base/{name}, dir: /scratch/run}}", **more}


@pytest.mark.parametrize(
    "name",
    [
        "global_step423858",
        "_global_step_423858_backup",
        "_global_step423858",
        "global_step423858_bak",
    ],
)
def test_the_offset_comes_from_the_start_checkpoints_name(neox, name):
    planned = neox(run=start(name))

    assert (
        planned.config("finetune")["iteration_offset"]
        == planned.config("resume")["iteration_offset"]
        == 423858
    )
    assert planned.decision("config.iteration_offset").origin.startswith("run.yaml:9:")
    assert planned.decision("checkpoint.start_iteration").value == 423858


@pytest.mark.parametrize(
    "name", ["final", "global_step", "global_stepX", "step_12", "global_step12x"]
)
def test_a_start_without_an_iteration_is_refused(neox, name):
    assert neox(run=start(name)).problem("carries no iteration").where == "run.yaml:9:21"


def test_an_offset_that_contradicts_the_start_is_refused_in_the_run_and_replaced_in_a_base(neox):
    neox("iteration_offset: 400000\n").problem(
        "contradicts the start checkpoint's iteration 423858"
    )
    planned = neox(base={"iteration_offset": "2000"})
    assert planned.config("finetune")["iteration_offset"] == 423858
    assert "instead of 2000 at base.yml:22:" in planned.decision("config.iteration_offset").reason


def test_upstream_has_no_offset(neox):
    planned = neox(options=UPSTREAM)

    assert "iteration_offset" not in planned.config("finetune")
    assert (
        planned.plan.resolved.guard.target == 1337
        and planned.plan.resolved.guard.counter == "latest"
    )


def test_the_guards_facts(neox):
    guard = neox().plan.resolved.guard

    assert (guard.layout, guard.target, guard.counter) == (
        "deepspeed",
        423858 + 1337,
        "greatest_folder",
    )
    assert (
        guard.tensor_parallel,
        guard.pipeline_parallel,
        guard.data_parallel,
        guard.zero_stage,
    ) == (8, 0, 192, 1)
    cadence = neox().plan.resolved.cadence
    assert (cadence.iterations, cadence.save_every, cadence.saves_on_signal) == (1337, 100, False)


def test_the_fork_from_scratch_counts_from_latest(neox):
    planned = neox(run=SCRATCH)

    assert sorted(planned.plan.resolved.configs) == ["config.resume.yml", "config.scratch.yml"]
    assert (
        planned.plan.resolved.guard.counter == "latest"
        and planned.plan.resolved.guard.target == 1337
    )
    assert planned.config("scratch")["finetune"] is False
    assert neox("iteration_offset: 2000\n", run=SCRATCH).plan.resolved.guard.target == 3337


def test_modes_differ_in_finetune_and_schedule_only(neox):
    planned = neox()
    first, later = planned.config("finetune"), planned.config("resume")

    assert first["finetune"] is True and later["finetune"] is False
    assert later["override_lr_scheduler"] is True and "override_lr_scheduler" not in first
    assert {k: v for k, v in first.items() if k != "finetune"} == {
        k: v for k, v in later.items() if k not in ("finetune", "override_lr_scheduler")
    }
    header = planned.plan.resolved.configs["config.finetune.yml"].splitlines()[3]
    assert header == "# The modes differ in: finetune, override_lr_scheduler."


def test_a_checkpoints_schedule_is_kept_when_asked_for(neox):
    planned = neox("use_checkpoint_lr_scheduler: true\n")

    assert "override_lr_scheduler" not in planned.config("resume")
    neox("use_checkpoint_lr_scheduler: true\noverride_lr_scheduler: true\n").problem(
        "exclude each other"
    )
    neox("override_lr_scheduler: false\n").problem("a resume stops when anything", "warning")


def test_finetune_in_the_run(neox):
    neox("finetune: true\n", run={"chain": "{jobs: 5}"}).problem(
        "`finetune: true` with a chain of 5 jobs"
    )
    assert neox("finetune: true\n").said() == []
    neox("finetune: true\n").problem("`finetune: true` has no effect", "warning")
    neox("finetune: true\n", run=SCRATCH).problem("without a `checkpoint.start`")
    neox("finetune: false\n").problem("`finetune: false` with a `checkpoint.start`")


def test_finetune_in_a_base_is_replaced(neox):
    planned = neox(base={"finetune": "true"}, run={"chain": "{jobs: 5}"})

    assert planned.config("resume")["finetune"] is False and planned.said() == []


def test_save_and_load_are_the_runs_folder(neox):
    planned = neox(base={"save": "/old", "load": "/older"})

    assert planned.config("resume")["save"] == planned.config("resume")["load"] == "/scratch/run"
    assert (
        neox('save: "/scratch/run/"\nload: /scratch//run\n').config("finetune")["save"]
        == "/scratch/run"
    )
    neox("load: /elsewhere\n").problem("`load: /elsewhere` contradicts")
    neox(run={"checkpoint": None}, base={"save": "/old"}).problem(
        "NeoX needs a folder for its checkpoints"
    )


def test_a_folder_named_like_a_checkpoint_is_refused(neox):
    neox(run={"checkpoint": "{dir: /scratch/run/global_step5}"}).problem(
        "is named like one checkpoint"
    )
    odd = {"checkpoint": "{dir: /scratch/old_global_step_runs/run}"}
    assert neox(run=odd).said() == []
    neox("keep_last_n_checkpoints: 100000\n", run=odd).problem("would delete everything in it")


@pytest.mark.parametrize(
    "line, message",
    [
        ("iteration: 423858", "makes every link load that checkpoint again"),
        ("no_load_optim: true", "throws the optimizer's state away"),
        ("s3_path: s3://b", "saves where the links cannot see"),
        ("checkpoint_factor: null", "`checkpoint_factor` is missing"),
        ("checkpoint_factor: 0", "must be a whole number of at least 1"),
        ("checkpoint_factor: 2.5", "must be a whole number of at least 1"),
        ("checkpoint_factor: 1\ncheckpoint_scale: log", "must be more than 1"),
        ("train_iters: null", "`train_iters` is missing"),
        ("train_iters: 0", "`train_iters: 0` must be at least 1"),
        ("train_epochs: 3\npack_impl: packed", "exclude each other|drop"),
        ("exit_interval: 150", "leaves at iteration 150 without a checkpoint"),
        ("exit_interval: 1337", "leaves at iteration 1337 without a checkpoint"),
        ("keep_last_n_checkpoints: 0", "deletes every checkpoint"),
        (
            "keep_last_n_checkpoints: 5",
            "stops the job when the link `global_step423858` becomes the oldest",
        ),
        (
            "lr_decay_style: sqrt",
            (
                "`lr_decay_style: sqrt` needs `cd_start_iter`, `cd_end_iter`, `start_cd_lr`,"
                " `decay_pp`"
            ),
        ),
        ("warmup: 0.01", "does not work with `iteration_offset: 423858`"),
    ],
)
def test_what_loses_work_is_refused(neox, line, message):
    planned = neox(line + "\n")
    if not message.endswith("|drop"):
        planned.problem(message)


def test_a_base_configs_warmup_is_left_out_and_said_in_the_fork(neox):
    planned = neox(base={"warmup": 0.01})

    assert planned.config("finetune")["warmup"] == 0.0
    assert planned.said("warning")


def test_both_lengths_are_refused(neox):
    neox("train_epochs: 3\ntrain_iters: 5\npack_impl: pack_until_overflow\n").problem(
        "`train_iters` and `train_epochs` exclude"
    )


def test_warmup_left_out_is_zero_in_the_fork(neox):
    planned = neox(base={"warmup": None})

    assert planned.config("finetune")["warmup"] == 0.0
    assert "warmup" not in neox(base={"warmup": None}, options=UPSTREAM).config("finetune")


def test_an_exit_on_a_checkpoint_or_after_the_end_is_fine(neox):
    assert neox("exit_interval: 8550\n").said() == []
    assert neox("exit_interval: 1400\n").said() == []
    planned = neox("exit_interval: 500\n")
    assert planned.said() == []
    assert planned.problem("need 3 links", "warning").hint.startswith("chain: {jobs: 3}")
    assert neox("exit_interval: 500\n", run={"chain": "{jobs: 3}"}).said("warning") == []
    assert (
        "`checkpoint_factor: 100`, such as 200"
        in neox("exit_interval: 150\n").problem("without a checkpoint").hint
    )


def test_retention_that_never_deletes_is_fine(neox):
    assert neox("keep_last_n_checkpoints: 100000\n").said() == []
    assert neox("keep_last_n_checkpoints: 15\n").said() == []  # 13 + the final one + the link
    neox("keep_last_n_checkpoints: 14\n").problem("becomes the oldest")


def test_retention_from_scratch_keeps_two(neox):
    neox("keep_last_n_checkpoints: 1\n", run=SCRATCH).problem(
        "deletes the last complete checkpoint"
    )
    assert neox("keep_last_n_checkpoints: 2\n", run=SCRATCH).said() == []


def test_retention_upstream_where_the_link_is_the_newest(neox):
    """Its link gets a name that is not counted, so it is like a run from scratch."""
    neox("keep_last_n_checkpoints: 1\n", options=UPSTREAM).problem(
        "deletes the last complete checkpoint"
    )
    planned = neox("keep_last_n_checkpoints: 2\n", options=UPSTREAM)
    assert planned.said() == []
    assert planned.plan.guard()["retention"] is True
    assert start_link(parse_settings(planned.plan.guard()))[0] == "start-423858"
    kept = neox("keep_last_n_checkpoints: 100000\n", options=UPSTREAM).plan.guard()
    assert kept["retention"] is False
    assert start_link(parse_settings(kept))[0] == "global_step423858"
    assert (
        neox("keep_last_n_checkpoints: 3\n", options=UPSTREAM, run=start("global_step1050")).said()
        == []
    )


def test_upstream_never_saves_over_its_start(neox):
    for name, more in (("1300", ""), ("1337", ""), ("1301", "extra_save_iters: [1301]\n")):
        planned = neox(more, options=UPSTREAM, run=start(f"global_step{name}"))
        planned.problem(f"saves a `global_step{name}` of its own", "warning")
        assert (
            planned.said() == []
            and start_link(parse_settings(planned.plan.guard()))[0] == f"start-{name}"
        )
    assert neox(options=UPSTREAM, run=start("global_step1301")).said() == []
    assert neox(options=UPSTREAM, run=start("global_step1400")).said() == []
    assert neox(run=start("global_step1300")).said() == []  # the fork counts on from there


def test_a_chain_that_saves_only_at_the_end_is_warned_about(neox):
    neox("checkpoint_factor: 2000\n", run={"chain": "{jobs: 3}"}).problem(
        "never comes before the end", "warning"
    )


def test_a_cadence_that_never_fires_in_the_wall_time_is_refused(neox):
    planned = neox(
        "checkpoint_factor: 1000\n", run={"time": '"1:00:00"', "estimate": "{step_time_s: 17}"}
    )

    planned.problem("never comes within")


def loop(factor, log, extra, train_iters):
    """NeoX's own loop (training.py:1408-1430 and 329-336), the slow way."""
    found = {0} & set(extra)
    for iteration in range(1, train_iters + 1):
        if iteration in extra:
            found.add(iteration)
        elif factor and not log and iteration % factor == 0:
            found.add(iteration)
        elif factor and log:
            power = 1
            while power < iteration + 1:
                if int(power) == iteration:
                    found.add(iteration)
                power *= factor
    return found | {train_iters}


@settings(deadline=None)
@given(
    st.integers(2, 40), st.booleans(), st.lists(st.integers(0, 80), max_size=4), st.integers(1, 90)
)
def test_saves_are_neox_own(factor, log, extra, train_iters):
    saves = Saves(factor, log, tuple(extra), train_iters)
    expected = loop(factor, log, extra, train_iters)

    assert saves.count() == len(expected)
    assert {i for i in range(1, train_iters) if saves.at(i)} == expected - {0, train_iters}
