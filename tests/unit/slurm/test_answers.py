"""Slurm's silence is told from its refusals, and a job that waits for a person from one that waits
for time.

The texts are what Slurm 22.05.8's commands printed with a controller that is down and without a
configuration, and messages of src/common/slurm_errno.c.
"""

from __future__ import annotations

import pytest

from hpctrain.slurm import answers, commands, jobs

NO_CONFIGURATION = [
    (
        "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: error: _establish_config_source: failed to fetch config\n"
        "sbatch: fatal: Could not establish a configuration source\n"
    ),
    (
        "squeue: error: s_p_parse_file: cannot stat file /etc/slurm/slurm.conf: No such file or"
        " directory, retrying\nsqueue: error: ClusterName needs to be specified\nsqueue: fatal:"
        " Unable to process configuration file\n"
    ),
]
SILENT = [
    "allocation failure: Unable to contact slurm controller (connect failure)",
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    (
        "scancel: error: Kill job error on job id 5: Unable to contact slurm controller (connect"
        " failure)"
    ),
    "Unexpected message received for job 5",
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "slurm_load_partitions: Zero Bytes were transmitted or received",
    "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
    (
        "squeue: error: If munged is up, restart with --num-threads=10\nsqueue: error: Munge encode"
        " failed: Failed to access"
    ),
    "sbatch: error: Batch job submission failed: Protocol authentication error",
    (
        "sacct: error: slurm_persist_conn_open: failed to open persistent connection to"
        " host:db:6819: Connection refused"
    ),
    "sacct: error: Problem talking to the database: Connection timed out",
]
REFUSED = [
    (
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing"
            " or exceeds some limit)"
        ),
        "partition",
    ),
    ("sbatch: error: invalid partition specified: nosuch", "partition"),
    (
        "sbatch: error: Batch job submission failed: Invalid license specification",
        "scontrol show licenses",
    ),
    (
        "sbatch: error: Batch job submission failed: Requested reservation is invalid",
        "scontrol show reservation",
    ),
    ("sbatch: error: Batch job submission failed: Invalid feature specification", "%f"),
    (
        "sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification",
        "%G",
    ),
    (
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition"
            " combination specified"
        ),
        "sacctmgr",
    ),
    ("sbatch: error: Batch job submission failed: Invalid qos specification", "sacctmgr"),
    ("sbatch: error: QOSMaxSubmitJobPerUserLimit", "sacctmgr"),
    (
        "sbatch: error: Batch job submission failed: Requested node configuration is not available",
        "sinfo -N",
    ),
    ("sbatch: error: Memory specification can not be satisfied", "sinfo -N"),
    ("Slurm accounting storage is disabled", ""),
    ("slurm_load_jobs error: Invalid job id specified", ""),
]


@pytest.fixture
def says(fake):
    """Let every command print this and end so."""

    def say(code, out="", err=""):
        for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol"):
            fake.says(name, out, err, code)

    return say


@pytest.mark.parametrize("words", [*NO_CONFIGURATION, *SILENT])
def test_silence_is_no_answer_in_one_line_with_what_to_do(says, words):
    says(1, err=words)
    for call in (
        lambda: commands.test_only("x"),
        jobs.of_user,
        lambda: commands.show("config"),
        lambda: commands.cancel(["1"]),
    ):
        with pytest.raises(commands.NoAnswer) as caught:
            call()
        problem = caught.value.problems[0]
        assert "Slurm did not answer" in problem.what and "\\n" not in problem.what
        assert (
            "no configuration" if words in NO_CONFIGURATION else "scontrol ping"
        ) in problem.hint
    assert commands.cluster_name() is None


@pytest.mark.parametrize("words, shown", REFUSED)
def test_a_refusal_is_an_answer_with_the_command_that_shows_the_limit(says, words, shown):
    says(1, err=words)

    assert commands.test_only("x") == (False, words)
    assert shown in answers.shown_by(words)


@pytest.mark.parametrize("words", SILENT)
def test_the_words_of_a_command_that_succeeded_are_no_silence(says, words):
    says(0, err=words)

    assert jobs.of_user() == []


@pytest.mark.parametrize(
    "out, job_id",
    [
        ("77\n", "77"),
        ("77;cluster\n", "77"),
        ("Welcome to 2026\n77\n", "77"),
        ("77\nsee https://x/77\n", "77"),
        ("  77  \n", "77"),
    ],
)
def test_the_id_is_found_between_what_a_wrapper_prints(says, out, job_id):
    says(0, out)

    assert commands.submit("x") == job_id


@pytest.mark.parametrize(
    "code, out, err",
    [
        (
            1,
            "",
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        ),
        (
            1,
            "",
            (
                "sbatch: error: Batch job submission failed: Unable to contact slurm controller"
                " (connect failure)"
            ),
        ),
        (-9, "", ""),
        (0, "", ""),
        (0, "submitted, see the portal\n", ""),
        (0, "77\n78\n", ""),
        (1, "77\n", "broken pipe"),
        (1, "", ""),
    ],
)
def test_a_lost_answer_is_no_refusal(says, code, out, err):
    says(code, out, err)

    with pytest.raises(commands.Unsure, match="may be queued"):
        commands.submit("x")


@pytest.mark.parametrize("words", [words for words, _ in REFUSED if words.startswith("sbatch")])
def test_a_refused_job_is_not_called_maybe_queued(says, words):
    says(1, err=words)

    with pytest.raises(commands.EnvironmentFault) as caught:
        commands.submit("x")
    assert not isinstance(caught.value, commands.Unsure) and words in caught.value.problems[0].what


@pytest.mark.parametrize(
    "state, reason, what, command",
    [
        ("PENDING", "JobHeldUser", "held", "scontrol release 7"),
        ("PENDING", "JobHeldAdmin", "administrators", ""),
        ("PENDING", "job requeued in held state", "held", "scontrol release 7"),
        ("PENDING", "launch failed requeued held", "held", "scontrol release 7"),
        ("PENDING", "launch_failed_requeued_held", "held", "scontrol release 7"),
        ("REQUEUE_HOLD", "", "held", "scontrol release 7"),
        ("SPECIAL_EXIT", "JobHeldUser", "held", "scontrol release 7"),
        ("PENDING", "JobHoldMaxRequeue", "held", "scontrol release 7"),
        (
            "PENDING",
            "DependencyNeverSatisfied",
            "never start",
            "scontrol update jobid=7 dependency=",
        ),
        ("PENDING", "BadConstraints", "never start", "scancel 7"),
        ("PENDING", "PartitionTimeLimit", "never start", "scancel 7"),
        ("PENDING", "QOSMaxNodePerJobLimit", "never start", "scancel 7"),
        ("PENDING", "AssocMaxGRESPerJob", "never start", "scancel 7"),
        ("PENDING", "InvalidQOS", "never start", "scancel 7"),
        ("PENDING", "ReservationDeleted", "never start", "scancel 7"),
        ("PENDING", "AssocGrpBillingMinutes", "used up", ""),
    ],
)
def test_what_waits_for_a_person_is_told_with_the_command_that_changes_it(
    state, reason, what, command
):
    found, release = answers.stuck("7", state, reason)

    assert what in found and release == command


@pytest.mark.parametrize(
    "reason",
    [
        "Priority",
        "Resources",
        "Dependency",
        "BeginTime",
        "QOSMaxJobsPerUserLimit",
        "QOSMaxSubmitJobPerUserLimit",
        "AssocGrpCPURunMinutesLimit",
        "AssocMaxJobsLimit",
        "ReqNodeNotAvail, UnavailableNodes:n1",
        "Licenses",
        "PartitionDown",
        "Reservation",
        "",
        "None",
    ],
)
def test_what_passes_by_itself_is_not_called_stuck(reason):
    assert answers.stuck("7", "PENDING", reason) == ("", "")


ONE, OTHER = "64|512000|gpu:8|x", "128|256000|(null)|y"


@pytest.mark.parametrize(
    ("nodes", "may_be"),
    [
        ([f"up|idle|{ONE}", f"up|mixed-|{ONE}"], False),
        ([f"up|idle~|{ONE}", f"up|allocated|{ONE}", f"up|down*|{ONE}"], False),
        ([f"up|idle|{ONE}", f"up|down*|{ONE}"], True),
        ([f"up|maint|{ONE}", f"up|reserved|{ONE}"], True),
        ([f"inact|idle|{ONE}", f"inact|idle|{ONE}"], True),
        ([f"up|idle|{OTHER}", f"up|idle|{OTHER}", f"up|drained$|{ONE}"], True),
        ([f"up|idle|{OTHER}", f"up|idle|{OTHER}", f"up|idle|{ONE}"], False),
        (["nonsense"], True),
        ([], False),
    ],
)
def test_what_no_node_has_is_told_from_nodes_that_are_down(nodes, may_be):
    assert answers.may_be_down("\n".join(nodes), 2) is may_be
