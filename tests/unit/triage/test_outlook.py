"""What a failure means: its part in the end, whose it is, whether it will recur, what to do; and
rules that know what is optimised and from where."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpctrain.triage.engine import Engine
from hpctrain.triage.failures import FAILURES, outlook
from hpctrain.triage.judge import judge
from hpctrain.triage.rules import GREEN, NOT_OBSERVED, RED

sys.path.insert(0, str(Path(__file__).parents[2]))
from triage_texts import diagnose, steps, verdicts  # noqa: E402


@pytest.mark.parametrize(
    ("line", "kind", "whose", "action"),
    [
        ("RuntimeError: CUDA error: uncorrectable ECC error", "broken GPU", "node", "exclude node"),
        ("RuntimeError: CUDA error: an illegal memory access", "gpu_fault", "program", "retry"),
        (
            "ConnectionError: server can't be reached at 0.0.0.0:8000",
            "service is gone",
            "service of the job",
            "look",
        ),
        (
            "HfHubHTTPError: 429 Client Error: Too Many Requests for url: https://huggingface.co/x",
            "hub refuses",
            "site",
            "stop",
        ),
        ("OSError: [Errno 24] Too many open files", "limit of processes", "environment", "stop"),
        ("RuntimeError: mismatch between collectives", "collectives differ", "program", "stop"),
        (
            "srun: error: Task launch for 7.0 failed on node c2: Socket timed out",
            "scheduler does not answer",
            "site",
            "retry",
        ),
        (
            "srun: error: Task launch for 7.0 failed on node c2: Unable to layout tasks",
            "config",
            "program",
            "stop",
        ),
    ],
)
def test_a_failure_tells_whose_it_is_and_what_to_do(line, kind, whose, action):
    diagnosis = diagnose(line.encode() + b"\n")
    cause = diagnosis.as_json()["cause"]
    assert (cause["kind"], cause["whose"], diagnosis.action) == (kind, whose, action)
    assert cause["role"] in ("root", "cascade")


def test_every_class_says_something_in_plain_words_without_a_node_that_nobody_named():
    for name in FAILURES:
        found = outlook(name, "", None, None)
        assert found.advice and not {"{", "}"} & set(found.advice.replace("{exclude:", ""))
        assert "exclude:" not in found.advice


def test_a_node_that_only_reported_is_not_to_be_excluded():
    line = b"n3:8:9 [2] NCCL WARN NET/IB: Got completion from peer 10.9.8.7<5> with status=12\n"
    one = diagnose(line)
    several = diagnose(line + line.replace(b"n3:", b"n4:") + line.replace(b"n3:", b"n5:"))
    assert "exclude:" not in one.advice
    assert "exclude: 10.9.8.7" in several.advice and "n3" not in several.advice


def test_an_abort_explains_only_what_nothing_else_does():
    abort = b"  traceback : Signal 6 (SIGABRT) received by PID 70112\n"
    watchdog = b"[rank2]:[E531] [Rank 2] Watchdog caught collective operation timeout: Work\n"
    assert diagnose(abort).cause.event.failure == "crash"
    for text in (abort + watchdog, watchdog + abort):
        event = diagnose(text).cause.event
        assert (event.failure, event.rank) == ("communication", 2)


def test_what_was_survived_before_explains_nothing_at_the_end():
    caught = (
        b'Traceback (most recent call last):\n  File "r.py", line 1, in f\nValueError: bad %d\n'
    )
    text = caught % 1 + steps(200) + caught % 2
    diagnosis = diagnose(text)
    assert diagnosis.cause is None and diagnosis.verdict == GREEN


FLAT = "'grad_norm': 0.4, 'learning_rate': 1e-06"


def flat(more="", count=130):
    lines = [
        f"{{'loss': {1.9 + i % 3 / 1000}, {FLAT}{more}, 'step': {i + 1}}}" for i in range(count)
    ]
    return "\n".join(lines).encode() + b"\n"


def test_a_flat_loss_from_the_beginning_is_red():
    assert verdicts(diagnose(flat()))["loss_trend"] == RED


def test_a_run_that_goes_on_from_a_checkpoint_may_be_flat():
    resumed = b"Resuming training from /ckpt/step-900\n" + flat()
    later = flat().replace(b"'step': ", b"'step': 90")
    for text in (resumed, later):
        assert verdicts(diagnose(text))["loss_trend"] == NOT_OBSERVED


def test_the_loss_of_a_policy_need_not_fall():
    assert verdicts(diagnose(flat(", 'reward': 0.5")))["loss_trend"] == NOT_OBSERVED


def test_few_and_noisy_losses_are_not_called_flat():
    noisy = [1.2, 0.9, 1.3, 1.0, 1.1, 1.25, 0.95, 1.05, 1.3, 0.9, 1.2, 1.1]
    lines = [f"{{'loss': {loss}, {FLAT}, 'step': {10 * i + 1}}}" for i, loss in enumerate(noisy)]
    assert verdicts(diagnose("\n".join(lines).encode()))["loss_trend"] == NOT_OBSERVED


def test_the_two_streams_of_a_job_are_one_start_whatever_their_order(tmp_path):
    engine = Engine()
    for name, text in (
        ("slurm-5021.err", b"[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried 1 GiB\n"),
        ("slurm-5021.out", steps(120)),
    ):
        reader = engine.log(str(tmp_path / name))
        reader.feed(text)
        reader.close()
    diagnosis = judge(engine)
    assert diagnosis.cause.event.failure == "gpu_oom"
    assert not any("attempts" in remark for remark in diagnosis.remarks)


def test_a_log_without_a_known_step_line_shows_what_looks_most_like_one():
    diagnosis = diagnose(b"tick 7: the loss went to 2.3 today\nbye\n")
    assert diagnosis.verdict == NOT_OBSERVED
    assert "tick 7" in diagnosis.summary


SAVE = b"OSError: [Errno 28] No space left on device: '/ckpt/model.safetensors'\n"
BUG = b"ValueError: the adapter has no name\n"
SRUN = b"srun: error: n1: task 0: Exited with exit code 1\n"


@pytest.mark.parametrize(
    ("after", "failure"),
    [(SAVE, "disk"), (BUG + SRUN, "program"), (BUG, None), (b"Aborted (core dumped)\n", None)],
)
def test_what_fails_after_the_last_step_failed_while_it_saved(after, failure):
    done = steps(120, total=120)
    cause = diagnose(done + b"Traceback (most recent call last):\n" + after).cause
    assert (cause.event.failure if cause else None) == failure
