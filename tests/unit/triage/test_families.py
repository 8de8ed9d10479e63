"""Failures are told by families: exit codes, signals, errno, devices, exceptions by class and by
where they came through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpctrain.triage import formats
from hpctrain.triage.rules import GREEN, RED

sys.path.insert(0, str(Path(__file__).parents[2]))
from triage_texts import diagnose, steps, verdicts  # noqa: E402


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("host_oom", "memory allocation of 2097152 bytes failed"),
        (
            "crash",
            (
                "ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -7)"
                " local_rank: 0 (pid: 5275) of binary: python"
            ),
        ),
        (
            "killed",
            (
                "ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -9)"
                " local_rank: 1 (pid: 5275) of binary: python"
            ),
        ),
        ("environment", "RuntimeError: HIP error: invalid device function"),
        (
            "host_oom",
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=487912.batch cgroup.",
        ),
        ("node", "salloc: error: Node failure on worker-1"),
        (
            "host_oom",
            (
                "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on"
                " memory."
            ),
        ),
        ("communication", "hpctrain: error: ray: node 2 left while the program ran"),
        ("communication", "hpctrain: error: ray: 2 of 3 nodes called within 600 s; missing: 1"),
        (
            "config",
            (
                "hpctrain: error: on nid000002: /project/verl is at warmup, and the stage needs"
                " branch gad; run: git -C …"
            ),
        ),
        (
            "config",
            (
                "hpctrain: error: on nid000002: `import verl` finds a folder (/project/gad/verl)"
                " and no package; install it: …"
            ),
        ),
        (
            "checkpoint",
            (
                "hpctrain: error: the start's models: /ck/start-model/actor has no weights; move it"
                " away"
            ),
        ),
        (
            "gpu_fault",
            (
                "h9:1281342:1283501 [1] include/alloc.h:50 NCCL WARN Cuda failure 'an illegal"
                " memory access was encountered'"
            ),
        ),
    ],
)
def test_a_single_line_of_a_public_report_is_recognised(failure, line):
    assert diagnose(line.encode() + b"\n").cause.event.failure == failure


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (
            "killed",
            "[launch.py:434:sigkill_handler] ['python', 'x.py'] exits with return code = -9",
        ),
        (
            "crash",
            "[launch.py:434:sigkill_handler] ['python', 'x.py'] exits with return code = -11",
        ),
        ("crash", "srun: error: n1: task 3: Exited with exit code 139"),
        (
            "crash",
            (
                "prterun noticed that process rank 4 with PID 61 on node n7 exited on signal 11"
                " (Segmentation fault)."
            ),
        ),
        ("crash", "subprocess.CalledProcessError: Command '['x']' died with <Signals.SIGBUS: 7>."),
        ("wrapper", "srun: error: n1: task 3: Exited with exit code 2"),
        ("disk", "OSError: [Errno 28] nobody translated this"),
        ("filesystem", "mylib.SaveFailedError: cannot write (os error 30)"),
        ("filesystem", "OSError: [Errno 121] whatever"),
        ("host_oom", "OSError: [Errno 12] whatever"),
        ("communication", "OSError: [Errno 113] whatever"),
        (
            "missing_file",
            "httpx.ConnectError: [Errno 101] Network is unreachable at https://huggingface.co/x",
        ),
        (
            "environment",
            (
                "RuntimeError: CUDA error: the provided PTX was compiled with an unsupported"
                " toolchain."
            ),
        ),
        (
            "gpu_fault",
            "RuntimeError: HIP error: the operation cannot be performed in the present state",
        ),
        ("gpu_oom", "n1:1:2 [0] alloc.h:191 NCCL WARN Cuda failure 2 'out of memory'"),
        (
            "config",
            "omegaconf.errors.MissingMandatoryValue: Missing mandatory value: trainer.nnodes",
        ),
        ("config", "yaml.scanner.ScannerError: mapping values are not allowed here"),
        ("checkpoint", "_pickle.UnpicklingError: pickle data was truncated"),
        (
            "node",
            "ray.exceptions.NodeDiedError: Task failed because the node it was running on is dead",
        ),
        ("node", "salloc: error: Prolog failure on node node003, aborting job 1234"),
        ("node", "slurmstepd: error: Prolog failed, status 256"),
        ("environment", "RuntimeError: Error building extension 'fused_adam': [1/3] /usr/bin/nvcc"),
        ("program", "(Worker pid=12, ip=10.0.0.1) KeyError: 'input_ids'"),
        ("program", "ERROR 02-09 02:31:11 engine.py:389] ValueError: anything"),
        ("program", "2026-10-31 03:11:02,475 - Tuner - INFO - [rank7]: AssertionError"),
    ],
)
def test_families_are_told_whole_whatever_the_member(failure, line):
    """Exit codes, signals, errno, the devices' errors and the classes of exceptions: no member
    needs a line of its own."""
    assert diagnose(line.encode() + b"\n").cause.event.failure == failure


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        ("{0}pyarrow.lib.ArrowInvalid: JSON parse error", None),
        ("{0}queue.Empty", None),
        ("[rank3]: {0}mylib.GaveUp: no more data", 3),
        ("(Worker pid=7) {0}zlib.error: Error -3 while decompressing", None),
    ],
)
def test_the_last_line_of_a_traceback_is_the_cause_whatever_its_class(line, rank):
    prefix = line[: line.index("{0}")]
    text = "".join(
        f"{prefix}{row}\n"
        for row in (
            "Traceback (most recent call last):",
            '  File "t.py", line 3, in main',
            "    step(batch)",
        )
    )
    noise = "[2026-01-01 00:00:00] [INFO] of another process\n"
    event = diagnose((text + noise + line.format("") + "\n").encode()).cause.event
    assert (event.failure, event.rank, event.place.number) == ("program", rank, 5)


def test_where_an_exception_came_through_tells_what_it_is_about():
    text = (
        'Traceback (most recent call last):\n  File "c.py", line 3, in {}\n    assert'
        " ok\nAssertionError: 4 != 8\n"
    )
    for function, failure in (
        ("load_checkpoint", "checkpoint"),
        ("validate_args", "config"),
        ("forward", "program"),
    ):
        assert diagnose(text.format(function).encode()).cause.event.failure == failure
    assert (
        diagnose(
            text.format("load_checkpoint").replace("4 != 8", "HIP out of memory").encode()
        ).cause.event.failure
        == "gpu_oom"
    )


@pytest.mark.parametrize(
    "text",
    [
        "WARNING 02-09 02:31:11 engine.py:389] ValueError: not tried again\n",
        (
            "Exception ignored in: <function A.__del__ at 0x7f>\nTraceback (most recent call"
            ' last):\n  File "a.py", line 1, in x\nqueue.Empty\n'
        ),
        "subprocess returned with exit code 0, return code = 0\n",
        "sample: He said that there was a ValueError: yes\n",
    ],
)
def test_what_ended_nothing_is_no_cause(text):
    assert diagnose(text.encode()).cause is None


@pytest.mark.parametrize(
    "line",
    [
        "2026-06-10 13:18:20,846 ERROR scripts.py:447 -- it did not work",
        "fatal error: newosproc",
        "srun: error: something that no version of Slurm has said yet",
        "pdsh@n0: n1: ssh exited with exit code 1",
    ],
)
def test_a_severity_explains_only_a_start_that_never_trained(line):
    assert diagnose(line.encode() + b"\n").verdict == RED
    for text in (steps(30) + line.encode() + b"\n", line.encode() + b"\n" + steps(30)):
        diagnosis = diagnose(text)
        assert (diagnosis.verdict, diagnosis.cause) == (GREEN, None)
    failed = diagnose(
        steps(30) + line.encode() + b"\nsrun: error: n1: task 0: Exited with exit code 1\n"
    )
    assert failed.cause.event.failure in ("program", "wrapper")


def test_a_log_in_which_nothing_is_known_shows_its_last_line():
    assert diagnose(b"loading\nwaiting for something\n\n").summary.endswith(
        "the last line: waiting for something"
    )


@pytest.mark.parametrize(
    "text",
    [
        "salloc: error: Prolog failure on node c01, aborting job 12\n",
        (
            "slurmstepd: error: Prolog failed, status 256\nsrun: error: Task launch for StepId=12.0"
            " failed on node c01: Job prolog failed\n"
        ),
    ],
)
def test_the_node_whose_prolog_failed_is_named(text):
    event = diagnose(text.encode()).cause.event
    assert (event.failure, event.node) == ("node", "c01")


def test_the_host_that_open_mpi_names_below_is_the_node():
    text = (
        b"Open MPI failed an OFI Libfabric library call (fi_domain).  This is highly\nunusual\n\n "
        b" Local host: crusher051\n"
    )
    assert diagnose(text).cause.event.node == "crusher051"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b"Training Epoch: 0 Training Iteration: 1787  average_loss : 2.354  step_loss : 3.146",
            (1787, 2.354),
        ),
        (
            (
                b"[losses/total_loss: 1.64 | losses/value_loss: 7.62]:  16%|#  | 1024/6400"
                b" [1:14:23<1:13:02,  1.23it/s]"
            ),
            (1024, 1.64),
        ),
        (
            b"Steps:   0%|  | 12/500000 [12:44<14459:40:43, 104.11s/it, loss=0.36, lr=5e-6]",
            (12, 0.36),
        ),
        (
            b"[17:11:05.85] Epoch: [0]  [   30/13000]  eta: 2:17:53  closs: 1.5078 (1.6011)",
            (30, 1.5078),
        ),
        (b"step 3 eval/total_loss: 1.5", None),
    ],
)
def test_a_loop_of_ones_own_is_read_in_the_spellings_people_use(line, expected):
    step = formats.anything(line)
    assert (step and (step.iteration, step.loss)) == expected


def test_what_slurm_ended_is_over_though_its_tasks_wrote_on_a_little():
    ended = (
        b"slurmstepd: error: *** STEP 5.0 ON n7 CANCELLED AT 2026-01-10T15:27:25 DUE TO TIME LIMIT"
        b" ***\n"
    )
    assert diagnose(steps(30) + ended + steps(5, first=31)).cause.event.failure == "time_limit"
    # it began anew from an earlier checkpoint
    assert diagnose(steps(30) + ended + steps(5, first=20)).cause is None


def test_an_exception_while_a_package_is_imported_is_about_the_environment():
    frame = '  File "{}", line 3, in {}\n    x\n'
    package, own = "/opt/venv/lib/python3.11/site-packages/bnb/__init__.py", "/work/train.py"
    start = "Traceback (most recent call last):\n"
    end = "RuntimeError: something is wrong\n"
    importing = (
        start
        + frame.format(own, "<module>")
        + frame.format(package, "<module>")
        + frame.format(package, "setup")
        + end
    )
    assert diagnose(importing.encode()).cause.event.failure == "environment"
    calling = start + frame.format(own, "<module>") + frame.format(package, "train") + end
    assert diagnose(calling.encode()).cause.event.failure == "program"
    as_module = (
        start
        + frame.format("<frozen runpy>", "_run_module_as_main")
        + frame.format(package, "<module>")
        + frame.format(own, "main")
        + end
    )
    assert diagnose(as_module.encode()).cause.event.failure == "program"


def test_what_a_shell_says_in_passing_yields_to_any_exception():
    aside = b"df: /root/.triton/autotune: No such file or directory\n"
    assert (
        diagnose(aside + b"srun: error: n1: task 0: Exited with exit code 1\n").cause.event.failure
        == "missing_file"
    )
    assert diagnose(aside + b"ValueError: x\n").cause.event.failure == "program"


def test_a_loss_scale_that_now_and_then_skips_is_healthy_and_one_at_its_minimum_is_not():
    line = (
        "[2026-04-28 06:52:00,878] [INFO] [logging.py:96:log_dist] [Rank 0] step={}, skipped={},"
        " lr=[1e-06], mom=[0.9]\nstep {} loss: 2.5\n"
    )
    assert (
        verdicts(
            diagnose("".join(line.format(10 * i, i // 40, 10 * i) for i in range(1, 100)).encode())
        )["skipped_steps"]
        == GREEN
    )
    assert (
        verdicts(diagnose("".join(line.format(10 * i, i, 10 * i) for i in range(1, 100)).encode()))[
            "skipped_steps"
        ]
        == RED
    )
    stuck = b"[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 1, reducing to 1\n"
    assert verdicts(diagnose(stuck))["skipped_steps"] == RED
