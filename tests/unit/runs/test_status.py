"""status and cost from squeue, sacct and the run directory, each of them optional; the answers of a
real Slurm 22.05 as text."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.runs import cost
from hpctrain.runs.records import find_runs, read_run
from hpctrain.runs.status import observe
from hpctrain.slurm import commands as slurm
from hpctrain.slurm import jobs
from hpctrain.slurm.jobs import Answer, parse_sacct, parse_squeue, parse_time
from hpctrain.triage.records import utc

S = "\x1f"
NOW = 1795250000.0
SQUEUE = "\n".join(
    S.join(fields)
    for fields in [
        (
            "102",
            "RUNNING",
            "None",
            "2026-11-20T21:00:00",
            "2026-11-20T20:00:00",
            "nid[000001-000002]",
            "2",
            "2026-11-20T23:00:00",
            "/r/a",
            "a b",
            "(null)",
            "/r/a/job.sbatch 2",
        ),
        (
            "103",
            "PENDING",
            "Dependency",
            "2026-11-21T02:00:00",
            "2026-11-20T20:00:00",
            "",
            "2",
            "N/A",
            "/r/a",
            "a",
            "",
            "/r/a/job.sbatch 2",
        ),
        ("garbage",),
    ]
)
SACCT = "\n".join(
    S.join(fields)
    for fields in [
        (
            "101",
            "101",
            "NODE_FAIL",
            "0:0",
            "2026-11-20T18:00:00",
            "2026-11-20T18:00:05",
            "2026-11-20T18:30:05",
            "1800",
            "nid[000001-000002]",
            "2",
            "/r/a",
            "a",
            "",
        ),
        (
            "101",
            "101",
            "TIMEOUT",
            "0:15",
            "2026-11-20T18:31:00",
            "2026-11-20T18:40:00",
            "2026-11-20T20:40:00",
            "7200",
            "nid[000001,000003]",
            "2",
            "/r/a",
            "a",
            "",
        ),
        (
            "102",
            "102",
            "RUNNING",
            "0:0",
            "2026-11-20T20:00:00",
            "2026-11-20T21:00:00",
            "Unknown",
            "60",
            "nid[000001-000002]",
            "2",
            "/r/a",
            "a",
            "",
        ),
        (
            "104",
            "104",
            "CANCELLED by 1000",
            "0:0",
            "2026-11-20T20:00:00",
            "None",
            "2026-11-20T20:00:00",
            "0",
            "None assigned",
            "2",
            "/r/a",
            "a",
            "",
        ),
    ]
)
PLAN = {
    "run": "a",
    "site": "lumi",
    "recipe": "command",
    "guard": {"target": 1000, "checkpoint_dir": None},
    "job": {
        "time_s": 7200,
        "num_nodes": 2,
        "tasks_per_node": 8,
        "step_time_s": 10.0,
        "save_every": 100,
        "num_links": 3,
        "iterations": 1000,
        "signal": {"lead_s": 60},
        "saves_on_signal": False,
    },
    "cost": {
        "node_hours": 4.0,
        "gpu_hours": 32.0,
        "billed": 16.0,
        "unit": "GPU-hour",
        "formula": "f",
    },
}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "a"
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "ledger.jsonl").write_text(
        lines(
            *(
                {
                    "event": "submitted",
                    "link": link,
                    "job_id": str(100 + link),
                    "depends_on": None,
                    "time": "2026-11-20T17:59:00Z",
                    "kind": "link",
                }
                for link in (1, 2, 3)
            )
        )
        + '{"event": "submi'
    )
    begin = {
        "event": "begin",
        "exit_code": None,
        "nodes": "nid[000001-000002]",
        "reason": "",
        "checkpoint": None,
    }
    (folder / "links.jsonl").write_text(
        lines(
            {
                **begin,
                "link": 1,
                "job_id": "101",
                "restart": 0,
                "mode": "scratch",
                "iteration": 0,
                "time": "2026-11-20T18:00:10Z",
            },
            {
                **begin,
                "link": 1,
                "job_id": "101",
                "restart": 1,
                "mode": "resume",
                "iteration": 100,
                "time": "2026-11-20T18:40:10Z",
                "checkpoint": "global_step100",
            },
            {
                **begin,
                "link": 2,
                "job_id": "102",
                "restart": 0,
                "mode": "resume",
                "iteration": 700,
                "time": "2026-11-20T21:00:05Z",
                "checkpoint": "global_step700",
            },
        )
    )
    return folder


@pytest.fixture
def slurm_says(monkeypatch):
    """Give squeue and sacct answers (None: not installed); counts the calls."""
    calls = []

    def say(squeue, sacct):
        answers = {"squeue": squeue, "sacct": sacct}

        def run(argv, timeout_s=60, input_text=None):
            assert argv[:2] == ["env", "TZ=UTC0"]
            calls.append(argv[2])
            return slurm.subprocess.CompletedProcess(argv, 0, answers[argv[2]], "")

        monkeypatch.setattr(slurm, "have", lambda name: answers.get(name) is not None)
        monkeypatch.setattr(slurm, "run", run)
        return calls

    return say


def test_squeue_and_sacct_together_tell_every_link(run_dir, slurm_says):
    slurm_says(SQUEUE, SACCT)
    status = observe([str(run_dir)], now_s=NOW)[0]
    assert status.state == "running"
    by_link = {link.link: link for link in status.links}
    assert (
        by_link[1].state,
        by_link[1].restarts,
        by_link[1].iteration_from,
        by_link[1].iteration_to,
    ) == ("TIMEOUT", 1, 0, 700)
    assert by_link[1].nodes == ("nid000001", "nid000003")
    assert (by_link[2].state, by_link[2].mode, by_link[2].active) == ("RUNNING", "resume", True)
    assert (by_link[3].state, by_link[3].reason, by_link[3].pending) == (
        "PENDING",
        "Dependency",
        True,
    )
    assert utc(by_link[3].expected_start_s) == "2026-11-21T02:00:00Z"
    assert status.progress.eta_s == 3000 and status.progress.links_needed == 1
    assert not any("squeue" in what or "sacct" in what for what in status.unseen)


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [(SQUEUE, None, "running"), (None, SACCT, "running"), (None, None, "unknown")],
)
def test_either_alone_or_neither_still_answers_and_says_what_it_could_not_see(
    run_dir, slurm_says, squeue, sacct, state
):
    slurm_says(squeue, sacct)
    status = observe([str(run_dir)], now_s=NOW)[0]
    assert status.state == state
    assert [link.link for link in status.links] == [1, 2, 3]
    assert any("squeue" in what for what in status.unseen) == (squeue is None)
    assert any("sacct" in what for what in status.unseen) == (sacct is None)
    json.dumps(status.as_json(), allow_nan=False)


def test_200_links_of_many_runs_cost_two_squeues_and_one_sacct(tmp_path, slurm_says):
    calls = slurm_says("", "")
    folders = []
    for number in range(4):
        folder = tmp_path / f"r{number}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_text(
            lines(
                *(
                    {"event": "submitted", "link": i, "job_id": str(1000 * number + i)}
                    for i in range(1, 51)
                )
            )
        )
        folders.append(str(folder))
    statuses = observe(folders, now_s=NOW)
    assert sum(len(status.links) for status in statuses) == 200
    assert calls == ["squeue", "squeue", "sacct"]


def test_an_unknown_job_id_is_no_error(monkeypatch):
    monkeypatch.setattr(slurm, "have", lambda name: True)
    monkeypatch.setattr(
        slurm,
        "run",
        lambda argv, **_: slurm.subprocess.CompletedProcess(
            argv, 1, "", "slurm_load_jobs error: Invalid job id specified"
        ),
    )
    answer = jobs.query(["9"])
    assert answer.jobs == {} and answer.unseen == ()


def test_slurm_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(slurm, "have", lambda name: True)
    monkeypatch.setattr(
        slurm,
        "run",
        lambda argv, **_: slurm.subprocess.CompletedProcess(
            argv, 1, "", "Slurm accounting storage is disabled"
        ),
    )
    assert "sacct: Slurm accounting storage is disabled" in jobs.query(["9"]).unseen


@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=400),
    st.text(alphabet="0123456789:-TN/A|\x1f\n RUNINGPED", max_size=400),
)
def test_any_answer_of_slurm_is_parsed_without_a_crash(one, other):
    for text in (one, other):
        parse_squeue(text)
        parse_sacct(text)


def test_every_torn_run_directory_still_gives_a_status(run_dir):
    whole = {
        name: (run_dir / name).read_bytes() for name in ("plan.json", "ledger.jsonl", "links.jsonl")
    }
    for name, content in whole.items():
        for replacement in (
            None,
            b"",
            content[: len(content) // 2],
            b"\xff\x00[]",
            b"[1, 2]",
            b'{"event": {}}\n',
        ):
            path = run_dir / name
            path.unlink()
            if replacement is not None:
                path.write_bytes(replacement)
            status = observe([str(run_dir)], ask_slurm=False, now_s=NOW)[0]
            json.dumps(status.as_json(), allow_nan=False)
            path.write_bytes(content)


def test_the_log_tells_the_end_that_nobody_recorded(run_dir):
    (run_dir / "logs" / "a-101.out").write_text(
        "hpctrain: job 101, restart 1, 2 nodes: nid[000001-000002]\n step 5/1000"
        " loss=2.0\nslurmstepd: error: *** JOB 101 ON nid000001 CANCELLED AT 2026-11-20T20:40:00"
        " DUE TO TIME LIMIT ***\n"
    )
    status = observe([str(run_dir)], ask_slurm=False, now_s=NOW)[0]
    assert (
        status.links[0].state == "TIMEOUT" and status.links[0].reason == "time limit on nid000001"
    )


def test_runs_are_found_by_directory_name_and_job_id(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = [os.path.realpath(run_dir)]
    for target in (str(run_dir), "runs/a", "a", "102", "runs", str(run_dir / "plan.json"), None):
        assert [os.path.realpath(path) for path in find_runs(target)] == wanted, target
    for target in ("b", "999999", str(tmp_path / "nowhere")):
        with pytest.raises(UsageError):
            find_runs(target)
    with pytest.raises(EnvironmentFault):
        read_run(str(tmp_path / "nowhere"))


def test_each_start_is_billed_for_the_time_it_took(run_dir):
    answer = Answer(
        {"101": parse_sacct(SACCT)["101"][1], **{job.job_id: job for job in parse_squeue(SQUEUE)}},
        {"101": parse_sacct(SACCT)["101"][:1]},
    )
    spent = cost.spent(read_run(str(run_dir)), answer, parse_time("2026-11-20T22:00:00Z"))
    assert [(s.job_id, s.restart, s.elapsed_s) for s, _ in spent.starts] == [
        ("101", 0, 1800),
        ("101", 1, 7200),
        ("102", 0, 3600.0),
    ]
    assert spent.used.billed == pytest.approx(16 * (1800 + 7200 + 3600) / 7200)
    assert spent.used.gpu_hours == pytest.approx(32 * 1.75)
    # 103 pends with its whole time, 102 has an hour left.
    assert spent.still.time_s == pytest.approx(7200 + 3600)


def test_without_slurm_the_records_and_the_next_start_bound_the_time(run_dir):
    spent = cost.spent(read_run(str(run_dir)), Answer({}, {}, ("x",)), NOW)
    assert [(s.restart, s.elapsed_s) for s, _ in spent.starts] == [
        (0, 2400.0),
        (1, None),
        (0, None),
    ]
    assert sum("how long job" in what for what in spent.unseen) == 2


def test_lumis_formula_by_hand(hpctrain, tmp_path):
    """standard-g: 4 GPU-hours a node-hour, so 192 nodes for 48 hours are 36,864
    (docs.lumi-supercomputer.eu, billing)."""
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "x",
                "site": "lumi",
                "recipe": "command",
                "account": "project_465000000",
                "partition": "standard-g",
                "nodes": 192,
                "gpus_per_node": 8,
                "time": "2-00:00:00",
                "recipe_options": {"argv": ["true"]},
            }
        )
    )
    answer = json.loads(
        hpctrain(
            "cost", "run.yaml", "--array", "3", "--ladder", "1,8,16", "--json", cwd=tmp_path
        ).stdout
    )
    bills = {bill["what"]: bill["billed"] for bill in answer["bills"]}
    assert bills["one job"] == 36864 and bills["an array of 3 such jobs"] == 3 * 36864
    # A rung is a job of half an hour, as `hpctrain ladder` submits it; whole nodes there too.
    assert bills["rung of 8 GPUs"] == 4 * 0.5 and bills["rung of 16 GPUs"] == 8 * 0.5
    bad = hpctrain("cost", "run.yaml", "--ladder", "8,1", cwd=tmp_path)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr


def test_what_is_left_is_read_from_the_sites_own_tool():
    said = (
        "Project | CPU\nproject_465000001 | 12,345/500000 (2.4%) core/hours | 6,789.5/50000 (13%)"
        " gpu/hours|\n"
    )
    from hpctrain.config.site import load_site

    patterns = load_site("lumi").values["tools"]["allocation"]["patterns"]
    left = cost.read_allocation(said, patterns["GPU-hour"], "project_465000001", "GPU-hour")
    assert left is not None and (left.used, left.granted, left.left) == (6789.5, 50000, 43210.5)
    assert cost.read_allocation(said, patterns["GPU-hour"], "project_465000002", "GPU-hour") is None
    assert (
        cost.read_allocation("nonsense", patterns["core-hour"], "project_465000001", "core-hour")
        is None
    )
