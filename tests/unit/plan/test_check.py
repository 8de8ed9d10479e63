"""What `check` finds, and how it says it."""

from __future__ import annotations

import json
import os

import pytest

from hpctrain.plan.check import shell_problems

RUN = """\
name: r
site: lumi
recipe: command
account: project_465001281
partition: standard-g
nodes: 2
time: 1h
recipe_options: {argv: [python3, train.py], workdir: /project/x}
"""


@pytest.fixture
def check(tmp_path, hpctrain, monkeypatch):
    """Write a run.yaml (RUN with lines replaced or added) and check it: gives the exit code and the
    problems."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(os.sys.executable)}:/usr/bin:/bin")

    def run(*changes, text=RUN):
        lines = text.splitlines()
        for change in changes:
            key = change.partition(":")[0]
            lines = [line for line in lines if not line.startswith(f"{key}:")] + [change]
        (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
        done = hpctrain("check", "--json", cwd=tmp_path)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)["problems"]

    return run


def the_error(result, code=2):
    assert result[0] == code, result
    errors = [problem for problem in result[1] if problem["level"] == "error"]
    assert len(errors) == 1, errors
    return errors[0]


def test_a_good_run_has_no_errors(check):
    code, problems = check()

    assert code == 0
    assert {problem["level"] for problem in problems} <= {"note"}


@pytest.mark.parametrize(
    ("change", "what", "hint"),
    [
        ("acount: x", "unknown key `acount`", "did you mean `account`?"),
        ("account: me", "is not an account", ""),
        ("nodes: 2000", "more than partition `standard-g` allows (1024)", ""),
        ("nodes: two", "must be a whole number", ""),
        ("nodes: '2'", "must be a whole number", "without quotes"),
        (
            "time: 80h",
            "`time: 80h` is longer than partition `standard-g` allows (2-00:00:00)",
            "chain: {jobs: 2}",
        ),
        ("time: soon", "not a duration", ""),
        ("partition: standard-x", "has no partition", "did you mean `standard-g`?"),
        ("site: lumo", "no site profile", "did you mean `lumi`?"),
        ("recipe: comand", "no recipe", "did you mean `command`?"),
        ("gpus_per_node: 9", "more than a `lumi-g` node has (8)", ""),
        (
            "sbatch: {cpus-per-task: 8}",
            "8 tasks x 8 cpus = 64 cores a node",
            "at most `cpus-per-task: 7`",
        ),
        ("sbatch: {mem: 500G}", "more than a `lumi-g` node gives", ""),
        ("sbatch: {acount: x}", "no option `--acount`", "did you mean `account`?"),
        ("sbatch: {output: x.log}", "cannot be set here", "logs/"),
        ("sbatch: {gpus: 16}", "cannot be set here", "gpus_per_node"),
        ("env: {RANK: 0}", "set by hpctrain or Slurm", ""),
        ("env: {HF_TOKEN: hf_x}", "looks like a secret", "secrets:"),
        ("chain: {jobs: 3}", "needs to know the checkpoints", "layout"),
        (
            "chain: {jobs: 300}",
            "more than partition `standard-g` allows (210 submitted jobs a user)",
            "",
        ),
        ("checkpoint: {start: /scratch/x/global_step1}", "without `checkpoint.dir`", ""),
        (
            "recipe_options: {argv: [a], workdri: /x}",
            "unknown key `recipe_options.workdri`",
            "did you mean `workdir`?",
        ),
        ("recipe_options: {argv: a}", "must be a list", ""),
        ("recipe_options: {}", "`recipe_options.program` is empty", ""),
        ("container_binds: [/x]", "without a `container`", ""),
        (
            "checkpoint: {dir: /project/project_465001281/c}",
            "do not belong on `project`",
            "/scratch/project_465001281",
        ),
        ("checkpoint: {dir: /users/me/c}", "do not belong on `home`", "/scratch/"),
    ],
)
def test_a_mistake_is_one_error_with_its_place_and_what_to_do(check, change, what, hint):
    if change.startswith("chain: {jobs: 300"):
        change = "chain: {jobs: 300}"
        result = check(
            change,
            "checkpoint: {dir: /scratch/c}",
            "recipe_options: {argv: [a], layout: deepspeed}",
        )
    else:
        result = check(change)
    error = the_error(result)

    assert what in error["what"]
    assert hint in error["hint"]
    assert error["where"].startswith("run.yaml:")


def test_a_checkpoint_folder_on_one_nodes_own_disk_is_warned_of(check):
    code, problems = check("checkpoint: {dir: /tmp/c}")

    assert code == 0
    assert [p["level"] for p in problems if "lies on each node's own /tmp" in p["what"]] == [
        "warning"
    ]


def test_all_problems_come_at_once(check):
    _, problems = check(
        "acount: x",
        "time: 80h",
        "nodes: 2000",
        "env: {RANK: 0}",
        "sbatch: {acount: x}",
        "site: lumi",
    )

    assert len([problem for problem in problems if problem["level"] == "error"]) == 5


def test_a_limit_names_where_it_is_set_and_what_would_fit(check):
    error = the_error(check("time: 60h", "nodes: 4"))

    assert "site_profiles/lumi/profile.yaml:" in error["why"]
    assert "small-g" in error["hint"]


def test_settings_of_the_submitting_shell_are_noticed(check, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    monkeypatch.setenv("SLURM_CPU_BIND", "none")
    code, problems = check()

    assert code == 0
    warnings = [problem["what"] for problem in problems if problem["level"] == "warning"]
    assert any("SBATCH_ACCOUNT" in what for what in warnings)
    # the job script takes none of those
    assert not any("SLURM_CPU_BIND" in what for what in warnings)


def test_missing_files_are_errors_at_the_site_and_notes_away_from_it(check):
    away = check("container: /scratch/none.sif", "data: {train: [/scratch/none]}")
    at_site = check(
        "site: local",
        "partition: main",
        "data: {train: [/scratch/none]}",
        "recipe_options: {argv: [true], workdir: /}",
    )

    assert away[0] == 0
    assert [problem["level"] for problem in away[1] if "is not there" in problem["what"]] == [
        "note"
    ] * 4
    assert at_site[0] in (1, 2)
    assert [problem["level"] for problem in at_site[1] if "is not there" in problem["what"]] == [
        "error"
    ] * 2


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_secrets_file_that_others_can_read_is_refused_and_never_shown(check, tmp_path, mode):
    secret = tmp_path / "s.env"
    secret.write_text("WANDB_API_KEY=sesame\nnot a line of sesame\n")
    secret.chmod(mode)
    open_ = the_error(check(f"secrets: {secret}"), code=1)
    secret.chmod(0o600)
    closed = the_error(check(f"secrets: {secret}"), code=1)

    assert "others can read" in open_["what"]
    assert "line 2" in closed["what"]
    assert "sesame" not in str(open_) + str(closed)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"SBATCH_ACCOUNT": "mine", "SBATCH_TIMELIMIT": "01:00:00", "SBATCH_REQUEUE": "1"}, ""),
        ({"SBATCH_EXPORT": "NONE", "SBATCH_MEM_BIND": "local", "SBATCH_WAIT": "1"}, ""),
        (
            {
                "SLURM_JOB_ID": "5",
                "SLURM_MEM_PER_CPU": "50",
                "SRUN_CPUS_PER_TASK": "4",
                "PMI_RANK": "0",
            },
            "",
        ),
        ({"SLURM_HINT": "nomultithread"}, ""),
        (
            {"SBATCH_ACCOUNT": "other", "SBATCH_ARRAY_INX": "0-3"},
            "SBATCH_ACCOUNT, SBATCH_ARRAY_INX",
        ),
        ({"SBATCH_OPEN_MODE": "truncate"}, "SBATCH_OPEN_MODE"),
        ({"SLURM_HINT": "multithread", "SLURM_CLUSTERS": "b"}, "SLURM_CLUSTERS, SLURM_HINT"),
    ],
)
def test_a_shell_is_warned_of_where_it_would_change_the_job_and_nowhere_else(environment, named):
    asked = {
        "account": "mine",
        "time": "01:00:00",
        "requeue": "",
        "open-mode": "append",
        "hint": "nomultithread",
    }
    found = list(shell_problems(environment, asked))

    assert [problem.what for problem in found] == (
        [f"this shell sets {named}, which sbatch takes before the job script's own options"]
        if named
        else []
    )
