"""Which sbatch options a run may give, and which variables of the shell would count instead."""

from __future__ import annotations

import pytest

from hpctrain.config.sbatch import (
    FREE,
    OWNED,
    REPLACES,
    SWITCHES,
    check_options,
    inherited_inputs,
    option_text,
    overriding_inputs,
)


def problems(**options):
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return [
        (one.what, one.where, one.hint) for one in check_options(named, lambda key: f"at {key}")
    ]


def test_options_that_slurm_has_and_the_plan_leaves_open_are_fine():
    assert (
        problems(nodelist="n1", mem="5G", exclusive=True, reservation="r", contiguous=False, nice=0)
        == []
    )


@pytest.mark.parametrize("name", ["time", "output", "export", "gpus", "comment"])
def test_what_hpctrain_decides_elsewhere_says_where(name):
    assert problems(**{name: "x"}) == [
        (f"`sbatch.{name}` cannot be set here", f"at {name}", OWNED[name])
    ]


def test_an_option_that_is_none_names_the_nearest():
    ((what, where, hint),) = problems(nodlist="n1")
    assert (
        "no option `--nodlist`" in what
        and where == "at nodlist"
        and "did you mean `nodelist`?" in hint
    )


def test_a_switch_takes_true_or_false_and_nothing_is_empty():
    assert problems(contiguous="yes")[0][0] == "`sbatch.contiguous` is a switch: true or false"
    assert problems(contiguous=1)[0][0] == "`sbatch.contiguous` is a switch: true or false"
    assert problems(nodelist="")[0][0] == "`sbatch.nodelist` is empty"
    assert problems(nice=0) == []


def test_every_option_is_of_one_kind():
    kinds = [REPLACES, FREE, set(OWNED), SWITCHES]
    for index, one in enumerate(kinds):
        for other in kinds[index + 1 :]:
            assert not one & other - {
                "contiguous",
                "overcommit",
                "reboot",
                "spread-job",
                "use-min-nodes",
            }


@pytest.mark.parametrize(
    ("value", "text"), [(True, ""), (False, None), (None, None), (0, "0"), ("a b", "a b")]
)
def test_an_options_text(value, text):
    assert option_text("x", value) == text


def test_what_srun_would_take_from_the_submitting_shell():
    every = inherited_inputs([])
    assert "SLURM_GPUS" in every and "SLURM_CPU_BIND" in every and every == sorted(set(every))
    assert "SLURM_JOB_ID" not in every
    own = inherited_inputs(["hint", "cpus-per-task"])
    assert set(every) - set(own) == {"SLURM_HINT", "SLURM_CPUS_PER_TASK", "SLURM_THREADS_PER_CORE"}


def test_what_sbatch_would_take_instead_of_the_scripts_own():
    options = {"time": "1h", "job-name": "r", "nodes": "2", "hint": "nomultithread"}
    same = {"SBATCH_TIMELIMIT": "1h", "SBATCH_JOB_NAME": "r", "SLURM_HINT": "nomultithread"}
    assert overriding_inputs({**same, "SBATCH_DEBUG": "1", "HOME": "/root"}, options) == []
    other = {"SBATCH_TIMELIMIT": "2h", "SBATCH_QOS": "debug", "SLURM_HINT": "multithread"}
    assert overriding_inputs({**same, **other}, options) == [
        "SBATCH_QOS",
        "SBATCH_TIMELIMIT",
        "SLURM_HINT",
    ]
