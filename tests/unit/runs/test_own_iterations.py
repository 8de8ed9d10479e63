"""A run counts its own iterations, also where its checkpoints count on from the start's."""

from __future__ import annotations

import json

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
