"""The step's environment is the job's own, whatever the shell had that ran sbatch.

The step is played by a fake srun here.
"""

from __future__ import annotations

import shlex

import pytest

from hpctrain.config.sbatch import inherited_inputs

RUN = """\
name: r
site: {site}
recipe: command
nodes: 1
time: "10:00"
{more}recipe_options: {{argv: [bash, -c, 'env -0 > "step.$RANK"'], workdir: "{here}"}}
"""


@pytest.fixture
def play(tmp_path, monkeypatch, cli, run_job):
    """Render a run and play its job with each of `shells`: what the job said and its tasks'
    environments."""
    monkeypatch.chdir(tmp_path)

    def start(*shells, site="local", more="", setup=""):
        (tmp_path / "run.yaml").write_text(RUN.format(site=site, more=more, here=tmp_path))
        if setup:
            monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
            monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
            template = tmp_path / ".hpctrain/templates/command/job.sbatch.j2"
            template.parent.mkdir(parents=True, exist_ok=True)
            template.write_text(
                '{% extends "!builtin/command/job.sbatch.j2" %}\n'
                "{% block user_setup %}\n" + setup + "\n{% endblock %}\n"
            )
        code, out, err = cli("render", "--force")
        assert code == 0, err
        return [job(out.strip(), env) for env in shells]

    def job(script, env):
        done, _ = run_job(script, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        steps = []
        for path in sorted(tmp_path.glob("step.*")):
            steps.append(dict(pair.split("=", 1) for pair in path.read_text().split("\0") if pair))
            path.unlink()
        return done.stdout, steps

    return start


def test_no_option_of_srun_comes_from_the_submitting_shell(play):
    memory = {f"SLURM_MEM_PER_{of}" for of in ("CPU", "GPU", "NODE")}
    inputs = [
        *inherited_inputs(()),
        *memory,
        "SRUN_CPUS_PER_TASK",
        "SRUN_EXPORT_ENV",
        "PMI_RANK",
        "PMIX_NAMESPACE",
    ]
    inputs += ["SBATCH_TIMELIMIT", "SLURM_ARRAY_TASK_ID"]
    of_this_job = {"SLURM_CPUS_PER_TASK", "SLURM_NTASKS_PER_NODE", "SLURM_OPEN_MODE"}
    [(out, [step])] = play({name: "7" for name in inputs})

    assert {name for name in inputs if name in step} == of_this_job | {"SRUN_CPUS_PER_TASK"}
    said = out.split("not taken from the submitting shell:")[1].splitlines()[0].split()
    assert {"SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "PMI_RANK"} <= set(said)
    assert not (of_this_job | memory) & set(said)  # of these the job's own may be among them


@pytest.mark.parametrize(
    "sbatch, kept",
    [
        ("hint: nomultithread", "SLURM_HINT"),
        ("hint: nomultithread", "SLURM_THREADS_PER_CORE"),
        ("threads-per-core: 1", "SLURM_THREADS_PER_CORE"),
        ("distribution: block", "SLURM_DISTRIBUTION"),
    ],
)
def test_what_slurm_sets_for_the_jobs_own_options_stays(play, sbatch, kept):
    [(_, [without])] = play({kept: "1"})
    [(_, [step])] = play({kept: "1"}, more=f"sbatch: {{{sbatch}}}\n")

    assert kept not in without and step[kept] == "1"


def test_what_the_jobs_own_setup_sets_for_srun_stays(play):
    [(_, [step])] = play({"SLURM_MPI_TYPE": "pmi2"}, setup="export SLURM_MPI_TYPE=pspmi")

    assert step["SLURM_MPI_TYPE"] == "pspmi"


def test_options_that_override_the_script_are_named_and_equal_ones_are_not(play):
    env = {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_PARTITION": "main",
        "SBATCH_OPEN_MODE": "truncate",
        "SBATCH_REQUEUE": "1",
        "SBATCH_JOB_NAME": "it's $(touch canary)\n#SBATCH",
        "SBATCH_EXPORT": "ALL",
        "SBATCH_ARRAY_INX": "0-3",
    }
    [(out, _)] = play(env)
    warned = [line for line in out.splitlines() if "warning: the submitting shell has" in line]

    assert [line.split(" has ")[1].split("=")[0] for line in warned] == [
        "SBATCH_ARRAY_INX",
        "SBATCH_JOB_NAME",
        "SBATCH_OPEN_MODE",
        "SBATCH_TIMELIMIT",
    ]


def test_a_plain_shell_is_not_spoken_of(play):
    [(out, _)] = play({})

    assert "submitting shell" not in out


@pytest.mark.parametrize("env", [{}, {"SLURM_NTASKS": "5", "SLURM_NPROCS": "5"}])
def test_the_number_of_tasks_is_the_runs_where_slurm_says_none_or_a_foreign_one(play, env):
    more = "tasks_per_node: 3\nsbatch: {cpus-per-task: 1}\n"
    [(_, steps)] = play({"SLURM_JOB_NUM_NODES": "2", **env}, more=more)

    assert {(step["WORLD_SIZE"], step["SLURM_NTASKS"], step["SLURM_NPROCS"]) for step in steps} == {
        ("6", "6", "6")
    }
    assert len(steps) == 6


def test_activation_scripts_run_outside_strict_mode_which_is_back_afterwards(play, tmp_path):
    script = tmp_path / "activate it's.sh"
    script.write_text(
        'export OLD="$NOT_SET"\nfalse\nfalse | cat\nfalse | true\nexport ACTIVE=1\nset +e\n'
    )
    setup = f". {shlex.quote(str(script))}\nMODE_INSIDE=$-$(shopt -po pipefail)"
    [(_, [step])] = play({}, setup=setup + "\nexport MODE_INSIDE")

    assert step["ACTIVE"] == "1" and step["OLD"] == ""
    assert (
        not {"e", "u"} & set(step["MODE_INSIDE"].split("set")[0])
        and "set +o pipefail" in step["MODE_INSIDE"]
    )
    text = (tmp_path / "runs/r/job.sbatch").read_text()
    assert text.split("export MODE_INSIDE\n")[1].split("\n")[0] == "set -euo pipefail"


def test_the_rendezvous_port_is_below_the_ones_the_kernel_gives_out_and_changes_with_each_start(
    play,
):
    jobs = (1, 12767, 12768, 2**31 - 1)
    starts = [(job, restart) for job in jobs for restart in range(3)]
    shells = [
        {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)} for job, restart in starts
    ]
    ports = [int(step["MASTER_PORT"]) for _, [step] in play(*shells)]

    assert all(20000 <= port < 32768 for port in ports)
    for job in jobs:
        assert len({port for start, port in zip(starts, ports) if start[0] == job}) == 3


def test_a_profiles_own_range_of_ports_is_kept(play, tmp_path):
    profile = "name: s\nextends: local\ntitle: t\nnetwork: {port_base: 40000, port_range: 10}\n"
    (tmp_path / "s.yaml").write_text(profile)
    played = play(*({"SLURM_JOB_ID": str(job)} for job in range(100, 110)), site="./s.yaml")

    assert sorted(int(step["MASTER_PORT"]) for _, [step] in played) == list(range(40000, 40010))
