"""pipeline.yaml: its stages, what they hand on, and every mistake at once with its place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpctrain.base.errors import HpctrainError, UsageError
from hpctrain.jobs.pipeline.stages import load_pipeline
from hpctrain.runs.records import find_pipeline, find_runs
from hpctrain.runs.status_table import of_pipeline

RUN = {
    "site": "lumi",
    "recipe": "command",
    "account": "project_465001281",
    "partition": "small-g",
    "nodes": 1,
    "tasks_per_node": 2,
    "gpus_per_node": 1,
    "time": "00:05:00",
}
OPTIONS = {"argv": ["true"], "layout": "deepspeed", "target_iteration": 9, "save_every": 3}


@pytest.fixture
def pipeline(tmp_path):
    """Two runs, `a` and `b`, and the planned pipeline of the stages given as YAML text."""

    def plan(stages, *assignments, a=None, b=None, options_a=None, options_b=None, **top):
        for name, more, options in (("a", a, options_a), ("b", b, options_b)):
            run = {
                "name": name,
                **RUN,
                "checkpoint": {"dir": f"/scratch/{name}"},
                "recipe_options": {**OPTIONS, **(options or {})},
                **(more or {}),
            }
            (tmp_path / f"{name}.yaml").write_text(json.dumps(run))
        body = "\n".join("  " + line for line in stages.splitlines())
        head = "".join(f"{key}: {value}\n" for key, value in {"name": "p", **top}.items())
        (tmp_path / "pipeline.yaml").write_text(f"{head}stages:\n{body}\n")
        return load_pipeline(str(tmp_path / "pipeline.yaml"), assignments)

    return plan


def said(excinfo):
    return [
        f"{problem.where}: {problem.what}"
        for problem in excinfo.value.problems
        if problem.level == "error"
    ]


TWO = "b: {run: b.yaml, from: a}\na: {run: a.yaml}"


def test_stages_come_after_the_one_they_are_from_and_know_what_they_will_get(pipeline, tmp_path):
    planned = pipeline("b: {run: b.yaml, from: a, as: hardlink, jobs: 4}\na: {run: a.yaml}")
    assert [stage.stage.name for stage in planned.stages] == ["a", "b"] and planned.errors == []
    first, second = planned.stages
    assert second.run_dir == str(tmp_path / "runs" / "p" / "b") and second.plan.spec.num_links == 4
    guard = second.plan.guard()
    assert guard["start"] is None and guard["start_as"] == "hardlink"
    assert guard["from"] == {
        "stage": "a",
        "run_dir": first.run_dir,
        "hand_over": "checkpoint",
        "checkpoint": "/scratch/a/global_step9",
        "model": None,
    }
    assert "from" not in first.plan.guard() and "start_as" not in first.plan.guard()
    (decision,) = [d for d in second.plan.decisions if d.name == "checkpoint.start"]
    assert (decision.value, decision.reason) == (
        "/scratch/a/global_step9",
        "stage `a` hands it over",
    )


def test_a_run_that_names_the_earlier_stages_folder_as_its_start_may_be_a_stage_too(pipeline):
    for start in ("/scratch/a", "/scratch/a/global_step3"):
        planned = pipeline(TWO, b={"checkpoint": {"dir": "/scratch/b", "start": start}})
        assert (
            planned.errors == []
            and planned.stages[1].plan.spec.checkpoint_start == "/scratch/a/global_step9"
        )


def test_a_stage_without_a_target_hands_over_what_is_not_known_yet(pipeline):
    planned = pipeline(TWO, options_a={"target_iteration": None})
    spec = planned.stages[1].plan.spec
    assert (
        spec.has_start
        and spec.checkpoint_start is None
        and planned.stages[1].plan.guard()["from"]["checkpoint"] is None
    )


def test_values_are_laid_over_a_run_and_keep_their_place(pipeline):
    planned = pipeline(
        "a: {run: a.yaml, set: {recipe_options.target_iteration: 12, checkpoint: {dir:"
        " /scratch/x}}}\n" + TWO.splitlines()[0]
    )
    assert (
        planned.stages[0].plan.resolved.guard.target == 12
        and planned.stages[0].plan.spec.checkpoint_dir == "/scratch/x"
    )
    assert planned.stages[1].plan.guard()["from"]["checkpoint"] == "/scratch/x/global_step12"
    assert (
        pipeline(TWO, "a.recipe_options.target_iteration=15").stages[0].plan.resolved.guard.target
        == 15
    )
    wrong = pipeline("a:\n  run: a.yaml\n  set:\n    nodez: 3\n    time: soon").errors
    assert [problem.where.split("pipeline.yaml:")[1].split(":")[0] for problem in wrong] == [
        "6",
        "7",
    ]


MODEL = {
    "argv": ["true"],
    "layout": "none",
    "target_iteration": None,
    "save_every": None,
    "model_dir": "/scratch/a/model: $(x)",
}


def test_a_model_is_put_where_the_recipe_or_the_stage_says(pipeline):
    planned = pipeline(
        "a: {run: a.yaml}\nb: {run: b.yaml, from: a, hand_over: model, into: [env.POLICY,"
        " config.model.path]}",
        options_a=MODEL,
    )
    assert planned.errors == []
    plan = planned.stages[1].plan
    assert plan.spec.env == {"POLICY": MODEL["model_dir"]} and plan.spec.config == {
        "model": {"path": MODEL["model_dir"]}
    }
    assert plan.guard()["from"]["model"] == MODEL["model_dir"] and not plan.spec.has_start


@pytest.mark.parametrize(
    ("stages", "wrong", "more"),
    [
        ("a: {run: a.yaml, from: aa}\naab: {run: b.yaml}", "there is no stage `aa`", {}),
        (
            "a: {run: a.yaml, from: b}\nb: {run: b.yaml, from: a}",
            "stages `a`, `b` wait for each other",
            {},
        ),
        ("a: {run: a.yaml, from: a}", "stage `a` waits for itself", {}),
        ("a: 3", "`stages.a: 3` must be a mapping", {}),
        ("a:", "`stages.a` is empty, and must be a mapping", {}),
        ("a: [run, a.yaml]\nb: {run: b.yaml, from: a}", "must be a mapping", {}),
        ("a: {run: a.yaml, as: copy}", "`as` without `from`", {}),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a, hand_over: model, as: copy}",
            "`as` is about checkpoints",
            {"options_a": MODEL},
        ),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a, into: [env.X]}",
            "`into` is about models",
            {},
        ),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a, hand_over: model}",
            "stage `a` leaves no model",
            {},
        ),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a, hand_over: model}",
            "does not say which key of its run is the model",
            {"options_a": MODEL},
        ),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a}",
            "keeps no checkpoints that could be handed over",
            {"options_a": {"layout": "none"}},
        ),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml}",
            "save into the same folder `/scratch/a`",
            {"b": {"checkpoint": {"dir": "/scratch/a"}}},
        ),
        ("a: {run: a.yaml}\nb: {run: b.yaml}", "are both called `a`", {"b": {"name": "a"}}),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a}",
            "`checkpoint.start` is given, and stage `a` hands over",
            {"b": {"checkpoint": {"dir": "/scratch/b", "start": "/x/global_step1"}}},
        ),
        (
            "a: {run: a.yaml}\nb: {run: b.yaml, from: a}",
            "`checkpoint.start` without `checkpoint.dir`",
            {"b": {"checkpoint": {}}, "options_b": {"layout": "none"}},
        ),
        ("a: {run: no_such.yaml}", "there is no `", {}),
        ("'a/../b': {run: a.yaml}", "a/../b", {}),
        ("a: {run: a.yaml, jobs: 0}\nb: {runn: b.yaml}", "runn", {}),
        ("{}", "no stages", {}),
        ("a: {run: a.yaml, set: {.x: 1}}", "is not a dotted key", {}),
    ],
)
def test_mistakes_are_refused_with_their_place(pipeline, stages, wrong, more):
    with pytest.raises(HpctrainError) as error:
        found = pipeline(stages, **more)
        if found.errors:
            raise UsageError(found.errors)
    assert any(wrong in line for line in [f"{p.where}: {p.what}" for p in error.value.problems]), (
        error.value.problems
    )


def test_all_problems_of_all_stages_come_at_once(pipeline):
    with pytest.raises(UsageError) as error:
        pipeline(
            "a: {run: a.yaml, from: c}\nb: {run: b.yaml, from: d, jobs: many}", schema_version=2
        )
    assert len(said(error)) == 4
    with pytest.raises(UsageError) as error:
        pipeline(TWO, "c.x=1", "a=3")
    assert len(said(error)) == 2


def test_dry_run_writes_nothing_and_prints_every_link(pipeline, cli, tmp_path, monkeypatch):
    pipeline("b: {run: b.yaml, from: a, jobs: 2}\na: {run: a.yaml, jobs: 3}")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, out, err = cli("pipeline", "--dry-run", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert (
        shown["schema_version"] == 1
        and not shown["submitted"]
        and sorted(os.listdir(tmp_path)) == before
    )
    assert [
        (stage["stage"], [link["expected"] for link in stage["links"]]) for stage in shown["stages"]
    ] == [("a", ["scratch", "resume", "resume"]), ("b", ["finetune", "resume"])]


def test_check_looks_at_every_stage_and_other_verbs_say_what_it_is(
    pipeline, cli, tmp_path, monkeypatch
):
    pipeline(TWO, b={"container": "/scratch/no.sif"})
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("check", "pipeline.yaml", "--json")
    assert code == 0 and any("no.sif" in problem["what"] for problem in json.loads(out)["problems"])
    pipeline(TWO, b={"nodes": 0})
    code, out, err = cli("check", "pipeline.yaml")
    assert code == 2 and "nodes: 0" in err
    code, out, err = cli("render", "pipeline.yaml")
    assert code == 2 and "is a pipeline" in err and "hpctrain pipeline" in err


def test_status_finds_a_pipeline_by_name_folder_and_file(pipeline, tmp_path, monkeypatch):
    from hpctrain.jobs.pipeline.queue import prepare
    from hpctrain.runs.status import observe

    planned = pipeline(TWO)
    monkeypatch.chdir(tmp_path)
    assert find_pipeline("p") is None
    prepare(planned)
    folder = str(tmp_path / "runs" / "p")
    wanted = [os.path.join(folder, "a"), os.path.join(folder, "b")]
    for target in ("p", "runs/p", "pipeline.yaml", "runs/p/pipeline.json", None):
        assert find_runs(target) == wanted, target
    assert find_runs("runs/p/b") == wanted[1:] and find_pipeline("a.yaml") is None
    shown = of_pipeline(folder, observe(wanted, ask_slurm=False))
    assert [(s["stage"], s["state"], s["from"], s["got"]) for s in shown["stages"]] == [
        ("a", "not submitted", None, None),
        ("b", "not submitted", "a", None),
    ]
    prepare(pipeline(TWO))  # a second time: the same files, no complaint


def test_cost_is_told_stage_by_stage_and_summed_in_each_unit_before_and_after(
    pipeline, cli, tmp_path, monkeypatch
):
    """small-g bills 0.5 GPU-hours an hour and GCD, and 2 nodes of whole standard-g 4 a node; a CPU
    stage has a unit of its own."""
    from hpctrain.jobs.pipeline.queue import prepare

    stages = (
        "a: {run: a.yaml, jobs: 3}\nb: {run: b.yaml, from: a, set: {partition: standard-g, nodes:"
        " 2, gpus_per_node: 8, time: 2h}}\nc: {run: b.yaml, set: {name: c, checkpoint.dir:"
        " /scratch/c, partition: standard, gpus_per_node: 0, time: 1h}}"
    )
    planned = pipeline(stages)
    assert planned.errors == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, out, err = cli("cost", "pipeline.yaml", "--json")
    assert code == 0, err
    before = json.loads(out)
    assert [(s["stage"], s["num_links"], s["spent"]) for s in before["stages"]] == [
        ("a", 3, None),
        ("b", 1, None),
        ("c", 1, None),
    ]
    a, b, c = (stage["at_most"] for stage in before["stages"])
    assert (a["time_s"], a["gpu_hours"], a["billed"], a["unit"]) == (
        900,
        pytest.approx(0.25),
        pytest.approx(0.125),
        "GPU-hour",
    )
    assert (b["gpu_hours"], b["billed"], c["gpu_hours"], c["unit"]) == (32, 16, 0, "core-hour")
    total = before["at_most"]
    assert total["gpu_hours"] == pytest.approx(32.25)
    assert (
        total["billed"] == {"GPU-hour": pytest.approx(16.125), "core-hour": c["billed"]}
        and c["billed"] > 0
    )
    assert not (tmp_path / "runs").exists()

    prepare(planned)
    records = [
        {
            "event": "begin",
            "link": 1,
            "job_id": "7",
            "restart": 0,
            "mode": "scratch",
            "time": "2026-11-20T20:00:00Z",
        },
        {
            "event": "end",
            "link": 1,
            "job_id": "7",
            "restart": 0,
            "mode": "scratch",
            "exit_code": 0,
            "time": "2026-11-20T20:30:00Z",
        },
    ]
    links = tmp_path / "runs" / "p" / "b" / "links.jsonl"
    links.write_text("".join(json.dumps(record) + "\n" for record in records))
    for target in ("pipeline.yaml", "runs/p", "p"):
        code, out, err = cli("cost", target, "--json")
        after = json.loads(out)
        assert code == 0 and after["at_most"] == total, err
        assert after["stages"][1]["spent"]["starts"][0]["elapsed_s"] == 1800
        assert (after["used"]["gpu_hours"], after["used"]["billed"]) == (
            8,
            {"GPU-hour": 4, "core-hour": 0},
        )
    code, out, err = cli("cost", "p")
    rows = {line.split("\t")[0]: line.split("\t") for line in out.splitlines()}
    assert rows["of"][3:9] == [
        "GPU-hours",
        "billed",
        "used GPU-hours",
        "used billed",
        "still GPU-hours",
        "still billed",
    ]
    assert (
        rows["b"][3:7] == ["32.00", "16.00 GPU-hours", "8.00", "4.00 GPU-hours"]
        and list(rows)[-1] == "the pipeline"
    )
    assert rows["the pipeline"][6] == "4.00 GPU-hours + 0.00 core-hours"


def test_cost_of_a_pipeline_refuses_what_is_about_one_run_and_says_a_stages_mistakes(
    pipeline, cli, tmp_path, monkeypatch
):
    pipeline(TWO)
    monkeypatch.chdir(tmp_path)
    for more in (("--jobs", "3"), ("--array", "2"), ("--ladder", "1,2")):
        code, out, err = cli("cost", "pipeline.yaml", *more)
        assert code == 2 and not out and "is a pipeline" in err and "chain.jobs" in err
    code, out, err = cli("cost", "pipeline.yaml", "--set", "b.nodes=0")
    assert code == 2 and not out and "nodes: 0" in err
    code, out, err = cli("cost", "pipelin.yaml")
    assert code == 2 and "there is no file `pipelin.yaml`" in err


def test_sft_then_dpo_hands_the_model_on_and_both_run_on_gpus(cli, tmp_path):
    """The example: 16 GCDs for the SFT, 32 for the DPO; its policy is the model that the SFT
    leaves, and its own reference."""
    example = str(Path(__file__).parents[3] / "examples" / "sft-then-dpo" / "pipeline.yaml")
    for site in ("lumi", "generic-cuda"):
        sft, dpo = load_pipeline(
            example, [f"sft.site={site}", f"dpo.site={site}", "dpo.partition=null"]
        ).stages
        assert sft.plan.errors == dpo.plan.errors == []
        assert (sft.plan.resolved.model, sft.plan.spec.num_nodes * sft.plan.tasks_per_node) == (
            "/scratch/project_465001281/models/ft",
            16,
        )
        assert dpo.plan.spec.num_nodes * dpo.plan.tasks_per_node == 32
        text = dpo.plan.resolved.configs["config_dpo.yaml"]
        assert (
            "policy_name: /scratch/project_465001281/models/ft" in text
            and "ref_name: /" not in text
        )
        assert not any("reference model" in problem.what for problem in dpo.plan.problems)
    (warned,) = (
        load_pipeline(example, ["dpo.config.ref_name=/models/other"]).stages[1].plan.problems
    )
    assert (
        "reference model `/models/other` is not the one that stage `sft` hands over" in warned.what
    )
    with pytest.raises(UsageError, match="config.export_dir"):
        load_pipeline(example, ["sft.config.export_dir=null"])


def test_the_next_command_is_what_was_typed_without_dry_run(pipeline, cli, tmp_path, monkeypatch):
    pipeline(TWO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def following(*typed):
        code, _, err = cli(*typed)
        assert code == 0, err
        return err.splitlines()[-1]

    assert following("pipeline", "--dry-run") == "next: hpctrain pipeline"
    assert (
        following(
            "pipeline",
            "pipeline.yaml",
            "--stage",
            "a",
            "--set",
            "a.env.X='b c'",
            "-o",
            "out dir",
            "--dry-run",
        )
        == "next: hpctrain pipeline pipeline.yaml --stage a --out 'out dir' --set 'a.env.X='\"'\"'b"
        " c'\"'\"''"
    )
    assert (
        following("chain", "a.yaml", "--jobs", "3", "--set", "nodes=1", "--dry-run", "-y")
        == "next: hpctrain chain a.yaml --jobs 3 --set nodes=1 --yes"
    )
    assert (
        following("plan", "a.yaml", "--set", "nodes=1")
        == "next: hpctrain check a.yaml --set nodes=1 && hpctrain render a.yaml --set nodes=1"
    )
    assert (
        following("check", "a.yaml", "--set", "nodes=1")
        == "next: hpctrain render a.yaml --set nodes=1"
    )
