"""The ladder's rungs as they are planned: own output, the same global batch, the toggles of the
recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.jobs.ladder import checks, good_enough, plan_rungs, purpose
from hpctrain.triage.engine import Engine
from hpctrain.triage.judge import judge
from hpctrain.triage.rules import Circumstances
from hpctrain.triage.thresholds import Thresholds

EXAMPLE = Path(__file__).parents[3] / "examples" / "lumi-neox-sft"


MEASURED = "estimate.memory_gib=40"  # so that the rungs of large models are not left out


@pytest.fixture
def as_it_is(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "run", ignore=shutil.ignore_patterns("runs"))
    return str(tmp_path / "run" / "run.yaml")


@pytest.fixture
def example(as_it_is):
    with open(as_it_is, "a", encoding="utf-8") as file:
        file.write("estimate: {memory_gib: 40}\n")
    return as_it_is


def test_a_rung_that_cannot_fit_is_left_out_and_told(as_it_is, cli):
    rungs = plan_rungs(as_it_is, [], [8, 16, 64], 150, "00:30:00")

    assert [rung.num_gpus for rung in rungs] == [16, 64]
    (told,) = rungs[0].left_out
    assert "the rung of 8 GPUs is left out: it cannot fit: at least 69 GiB" in told.what
    assert "left out" in cli("ladder", as_it_is, "--rungs", "8,16", "--dry-run")[2]
    with pytest.raises(UsageError, match="it cannot fit"):
        plan_rungs(as_it_is, [], [8], 150, "00:30:00")


def test_the_global_batch_stays_the_same_and_every_rung_has_its_own_output(example):
    rungs = plan_rungs(example, [], [8, 16, 64], 150, "00:30:00")
    assert [rung.changes["config.gradient_accumulation_steps"] for rung in rungs] == [192, 96, 24]
    for rung in rungs:
        plan = rung.loaded.plan
        config = plan.spec.config
        data = plan.spec.num_nodes * plan.gpus_per_node // 8  # tensor parallelism 8
        assert config["train_batch_size"] == 576 == 3 * config["gradient_accumulation_steps"] * data
        assert config["train_iters"] == 150 and plan.spec.num_links == 1
    assert (
        len({rung.run_dir for rung in rungs})
        == len({rung.loaded.plan.spec.checkpoint_dir for rung in rungs})
        == 3
    )


def test_every_rung_that_cannot_be_is_named_at_once(example):
    with pytest.raises(UsageError) as error:
        plan_rungs(example, [], [1, 2, 8], 150, "00:30:00")
    text = str(error.value)
    assert "1 ranks cannot be split" in text and "2 ranks cannot be split" in text


def test_a_batch_that_does_not_divide_is_refused(example):
    with pytest.raises(UsageError, match="cannot be kept"):
        plan_rungs(example, [], [40], 150, "00:30:00")


def test_a_dry_run_writes_nothing(hpctrain, example):
    top = Path(example).parent
    before = sorted(top.rglob("*"))
    done = hpctrain("ladder", example, "--rungs", "8,16", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert [rung["gpus"] for rung in json.loads(done.stdout)["rungs"]] == [8, 16]
    assert sorted(top.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "one", "more", "batch"),
    [
        ("hello", {}, {}, None),
        ("sft", {"config.zero_stage": 0}, {}, 64),
        ("lumi-dpo", {"config.dpo_training.fsdp": False}, {"config.dpo_training.fsdp": True}, 128),
        (
            "open-instruct-sft",
            {"recipe_options.deepspeed": "none", "config.use_8bit_optimizer": True},
            {"recipe_options.deepspeed": "zero3", "config.use_8bit_optimizer": False},
            128,
        ),
    ],
)
def test_each_recipe_has_its_toggles_and_keeps_its_batch(name, one, more, batch):
    """DeepSpeed off and 8-bit states on for one GPU, ZeRO-3 and none for more, where the recipe has
    these."""
    site = (
        ["site=lumi", "partition=small-g", "account=project_465001281", "gpus_per_node=8"]
        if name in ("hello", "sft")
        else []
    )
    path = str(EXAMPLE.parent / name / "run.yaml")
    rungs = plan_rungs(path, [*site, MEASURED], [1, 2, 8], 150, "00:30:00")
    for rung in rungs:
        wanted = one if rung.num_gpus == 1 else more
        assert {key: rung.changes[key] for key in wanted} == wanted
        decided = [
            d.value for d in rung.loaded.plan.decisions if d.name == "batch.train_batch_size"
        ]
        if batch:
            assert (
                decided == [batch] or rung.loaded.plan.spec.config.get("train_batch_size") == batch
            ), decided
        assert 150 in rung.changes.values()
    assert [purpose(rungs, rung)[0] for rung in rungs] == ["sanity", "distributed", "full"]


@pytest.mark.parametrize(
    "name", ["lumi-sft", "lumi-dpo", "lumi-neox-sft", "open-instruct-sft", "hf-sft"]
)
@pytest.mark.parametrize("options", [[], ["--set", "time=02:00:00"]])
def test_a_ladder_has_one_price_whoever_is_asked(name, options, cli):
    run_yaml = EXAMPLE.parent / name / "run.yaml"
    options = [*options, "--set", MEASURED]
    numbers = {"lumi-neox-sft": "8,16", "hf-sft": "1,2"}.get(name, "1,2,8")
    code, out, err = cli("ladder", run_yaml, "--rungs", numbers, *options, "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    code, out, err = cli("cost", run_yaml, "--ladder", numbers, *options, "--json")
    assert code == 0, err
    bills = [
        bill
        for bill in json.loads(out)["bills"]
        if "rung" in bill["what"] or "ladder" in bill["what"]
    ]

    assert bills == [*(rung["bill"] for rung in told["rungs"]), told["total"]]
    for what in ("time_s", "node_hours", "gpu_hours"):
        assert told["total"][what] == pytest.approx(
            sum(rung["bill"][what] for rung in told["rungs"])
        )
    assert all(rung["bill"]["time_s"] == 1800 for rung in told["rungs"])
    # The same in people's words, also where the site names no units.
    for verb in (["ladder", "--rungs", numbers, "--dry-run"], ["cost", "--ladder", numbers]):
        out = cli(verb[0], run_yaml, *verb[1:], *options)[1]
        assert f"{told['total']['gpu_hours']:,.2f}" in out.split("the ladder")[1].split("\n")[0], (
            out
        )


def test_the_questions_of_the_guides_are_answered_by_the_rules():
    lines = [f"step {i}/150 loss={2.5 - 0.01 * i:.4f} grad_norm=1.0\n" for i in range(1, 151)]
    for text, wanted in (
        (
            lines,
            {
                "loss": "pass",
                "finite": "pass",
                "memory": "pass",
                "gradients": "pass",
                "steps": "pass",
            },
        ),
        ([*lines[:120], "RuntimeError: CUDA out of memory\n"], {"memory": "fail"}),
        ([], {"loss": "not seen", "finite": "not seen", "steps": "not seen"}),
    ):
        engine = Engine()
        engine.log("x").feed("".join(text).encode())
        found = checks(judge(engine))
        assert {key: found[key] for key in wanted} == wanted


def test_a_ladder_after_one_that_climbed_has_folders_of_its_own(example):
    first = plan_rungs(example, [], [8, 16], 150, "00:30:00")
    # rendered only
    assert plan_rungs(example, [], [8, 16], 150, "00:30:00")[0].run_dir == first[0].run_dir
    (Path(first[1].run_dir) / "logs").mkdir(parents=True)
    (Path(first[1].run_dir) / "logs" / "x-17.out").write_text(
        "hpctrain: job 17, restart 0, 1 nodes: n1\n"
    )
    second = plan_rungs(example, [], [8, 16], 150, "00:30:00")
    assert [Path(rung.run_dir).name[-2:] for rung in second] == ["-2", "-2"]
    for before, after in zip(first, second):
        assert before.run_dir != after.run_dir
        assert after.changes["checkpoint.dir"] == before.changes["checkpoint.dir"] + "-2"


def planned(path, *words, steps=None, time=None, rungs=(8, 64)):
    return plan_rungs(path, words, list(rungs), steps, time)


def test_a_rung_has_the_time_that_its_steps_need(example):
    """A step of 17 s on 1,536 GPUs is one of 54 minutes on 8: the same batch, by accumulation."""
    step = "estimate.step_time_s=17"
    eight, more = planned(example, step, steps=4)
    assert [rung.step_time_s for rung in (eight, more)] == [17 * 192, 17 * 24]
    # A quarter more than the steps take, and ten minutes to start; never less than half an hour.
    assert eight.loaded.plan.spec.time_s == pytest.approx(1.25 * 4 * 17 * 192 + 600, abs=600)
    assert more.loaded.plan.spec.time_s == pytest.approx(1.25 * 4 * 17 * 24 + 600, abs=600)
    assert eight.bill.time_s == eight.loaded.plan.spec.time_s > more.bill.time_s
    # The rung's own plan counts with the rung's step, not with the whole run's.
    assert eight.loaded.plan.spec.step_time_s == 17 * 192
    assert [rung.loaded.plan.spec.time_s for rung in planned(example)] == [1800, 1800]
    assert planned(example, step, steps=1, time="02:00:00")[0].loaded.plan.spec.time_s == 7200


def test_a_rung_that_no_time_is_enough_for_says_so(example):
    with pytest.raises(UsageError) as caught:
        planned(example, "estimate.step_time_s=17")
    text = str(caught.value)
    assert "150 steps on 8 GPUs take about 5-16:00:00" in text and "--steps" in text
    assert len(caught.value.problems) == 1  # 64 GPUs do it in 17 hours


def test_a_time_that_the_steps_do_not_fit_in_is_refused(example):
    with pytest.raises(UsageError, match="4 steps on 8 GPUs take about 03:37:36"):
        planned(example, "estimate.step_time_s=17", steps=4, time="01:00:00")


CUT = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T10:17:12 DUE TO TIME LIMIT ***\n"


def diagnosed(steps, tail="", drop=0.01, **thresholds):
    lines = [
        f"step {i}/2000 loss={2.5 - drop * i:.4f} grad_norm=1.0\n" for i in range(1, steps + 1)
    ]
    engine = Engine(Thresholds(**thresholds))
    engine.log("x").feed(("".join(lines) + tail).encode())
    return judge(engine, Circumstances(running=False))


@pytest.mark.parametrize(
    ("diagnosis", "code", "last", "passed", "words"),
    [
        (lambda: diagnosed(150), 0, False, True, "GREEN"),
        (lambda: diagnosed(150), 1, False, False, "ended with exit code 1"),
        # Cut by its time limit: what a hundred steps say is said.
        (lambda: diagnosed(120, CUT), 1, False, True, "GREEN for 120 steps, until the time limit"),
        (lambda: diagnosed(100, CUT), 1, False, True, "GREEN for 100 steps"),
        (
            lambda: diagnosed(99, CUT),
            1,
            False,
            False,
            "the time limit came after 99 steps; 100 are needed",
        ),
        (lambda: diagnosed(120, CUT, drop=-0.02), 1, False, False, "RED"),
        (lambda: diagnosed(120, "RuntimeError: CUDA out of memory\n"), 1, False, False, "RED"),
        # The loss must fall by a tenth before more GPUs are worth it, unless told otherwise.
        (lambda: diagnosed(150, drop=0.001), 0, False, False, "the loss drop is only 3.9%"),
        (lambda: diagnosed(150, drop=0.001), 0, True, True, "GREEN"),
        (lambda: diagnosed(150, drop=0.001, loss_drop_to_scale=0.03), 0, False, True, "GREEN"),
        (lambda: diagnosed(120, CUT, drop=0.001), 1, False, False, "the loss drop is only 3.9%"),
        (lambda: diagnosed(20), 0, False, False, "not seen over enough steps"),
    ],
)
def test_when_the_next_rung_is_climbed(diagnosis, code, last, passed, words):
    answer, why = good_enough(diagnosis(), code, last)
    assert answer == passed and words in why, why


def test_a_rung_that_was_cut_too_early_says_which_time_is_enough():
    text = "".join(
        f" iteration {i:8d}/2000 | elapsed time per iteration (ms): 36000.0 | lm_loss:"
        f" {2.5 - 0.01 * i} |\n"
        for i in range(1, 51)
    )
    engine = Engine()
    engine.log("x").feed((text + CUT).encode())
    _, why = good_enough(judge(engine, Circumstances(running=False)), 1, False)
    assert "after 50 steps; 100 are needed" in why and "--time 01:25:00" in why


def test_thresholds_reach_the_judgement(cli, example):
    code, _, err = cli(
        "ladder", example, "--rungs", "8", "--dry-run", "--threshold", "loss_drop_to_scale=x"
    )
    assert code == 2 and "`x` is not a value for threshold `loss_drop_to_scale`" in err
