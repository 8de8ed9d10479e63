"""A run counts its own iterations, also where its checkpoints count on from the start's."""

from __future__ import annotations

import json
import shutil

import saves

from hpctrain.runs.status import observe
from hpctrain.runs.status_table import show
from hpctrain.triage.formats import megatron

LINE = (
    " iteration {:8d} [ {:8d}]/      60 [   423918] | elapsed time per iteration (ms): 100.0 |"
    " learning rate: 1.0E-05 | lm_loss: 2.0E+00 | number of skipped iterations: 0 |\n"
)


def test_the_forks_line_tells_its_own_iteration_and_total():
    step = megatron(LINE.format(22, 423880).encode())
    assert step is not None and (step.iteration, step.total, step.loss) == (22, 60, 2.0)


def test_percent_and_links_count_the_runs_own_iterations(tmp_path, capsys):
    """The fork names checkpoints offset + iteration: at its first second a run is at 0 %, not 100."""
    plan = {
        "run": "ft",
        "guard": {"target": 423918, "counter": "greatest_folder", "checkpoint_dir": None},
        "job": {"iterations": 60},
    }
    begin = {"event": "begin", "link": 1, "job_id": "7", "restart": 0, "mode": "finetune"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    links = tmp_path / "links.jsonl"
    links.write_text(json.dumps({**begin, "iteration": 423858}) + "\n")
    (status,) = observe([str(tmp_path)], ask_slurm=False)
    assert (status.progress.iteration, status.progress.target) == (0, 60)

    (tmp_path / "logs").mkdir()
    log = "hpctrain: job 7, restart 0, 1 nodes: n1\n" + LINE.format(22, 423880)
    (tmp_path / "logs" / "ft-7.out").write_text(log)
    with links.open("a") as file:
        file.write(
            json.dumps({**begin, "event": "end", "iteration": 423878, "exit_code": 0}) + "\n"
        )
    (status,) = observe([str(tmp_path)], ask_slurm=False)
    assert (status.links[0].iteration_from, status.links[0].iteration_to) == (0, 20)
    show([status], 0)
    assert "iteration 22 of 60 (37%) [423880 of 423918]" in capsys.readouterr().out


def test_what_was_trained_before_somebody_went_back_counts_no_more(tmp_path, cli):
    """`checkpoint use` of step 6 after step 12: the run is at 6, and then at what is trained on."""
    run, folder = tmp_path / "runs" / "ft", tmp_path / "ck"
    options = {"argv": ["x"], "layout": "dcp", "target_iteration": 30, "save_every": 3}
    spec = {"name": "ft", "site": "local", "recipe": "command", "time": "10m"}
    spec |= {"checkpoint": {"dir": str(folder)}, "recipe_options": options}
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    assert cli("render", tmp_path / "run.yaml", "--no-check")[0] == 0
    records = []

    def start(link, first, last, hour):
        begin = {"event": "begin", "link": link, "job_id": str(link), "restart": 0}
        begin |= {"iteration": first, "time": f"2026-11-01T{hour:02d}:00:00Z", "mode": "resume"}
        records.append(begin)
        if last is not None:
            end = {**begin, "event": "end", "iteration": last, "exit_code": 0}
            records.append({**end, "time": f"2026-11-01T{hour:02d}:50:00Z"})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run / "links.jsonl").write_text(lines)

    def at():
        (status,) = observe([str(run)], ask_slurm=False)
        return status.progress.iteration

    saves.ALL["dcp"].save(str(folder), 12, 1, "a")
    start(1, 0, 12, 1)
    assert at() == 12
    shutil.rmtree(folder / "step-12")
    saves.ALL["dcp"].save(str(folder), 6, 1, "a")
    assert at() == 6
    start(2, 6, None, 2)
    assert at() == 6
    saves.ALL["dcp"].save(str(folder), 9, 1, "a")
    start(2, 6, 9, 2)
    assert at() == 9
