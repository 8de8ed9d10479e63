"""A failure that would come again starts twice at most; one of a node, a network or a file system
does not count."""

from __future__ import annotations

import pytest

from hpctrain.runtime import startup

TRACE = 'Traceback (most recent call last):\n  File "/w/train.py", line {}, in <module>\n    go()\n'
NAME = TRACE.format(3) + "NameError: name 'modle' is not defined\n"


def log(quick, job, text, restart=0):
    folder = quick.dir / "logs"
    folder.mkdir(exist_ok=True)
    with (folder / f"{quick.guard['run']}-{job}.out").open("a") as file:
        file.write(f"hpctrain: job {job}, restart {restart}\nhpctrain: starting: scratch\n{text}")


def start(quick, number, text, code=1):
    found = quick.begin(number, job=str(100 + number))
    if found["decision"] == "run":
        log(quick, 100 + number, text)
        quick.end(code, job=str(100 + number))
    return found["decision"]


@pytest.fixture
def queued(quick):
    """Five links on record, as `hpctrain chain` queues them, and much patience."""
    quick.write_plan(give_up_after=5)
    (quick.dir / "ledger.jsonl").write_text(
        "".join(
            f'{{"event": "submitted", "link": {n}, "job_id": "{100 + n}"}}\n' for n in range(1, 6)
        )
    )
    return quick


def test_the_same_failure_twice_gives_up_with_its_line_as_the_reason(queued):
    assert [start(queued, n, f"nid00{n}: {NAME}") for n in (1, 2)] == ["run", "run"]
    assert start(queued, 3, NAME) == "gave_up"
    assert "the same failure: NameError: name 'modle' is not defined" in queued.said
    assert queued.records()[-1]["reason"].count("NameError") == 1


def test_a_link_that_is_queued_after_it_tries_again(queued):
    for n in (1, 2):
        start(queued, n, NAME)
    ledger = queued.dir / "ledger.jsonl"
    ledger.write_text(
        ledger.read_text()
        + '{"event": "submitted", "link": 6, "job_id": "106", "last_start": "102.0"}\n'
    )
    assert start(queued, 6, NAME) == "run"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (NAME, TRACE.format(9) + "ValueError: the data are empty\n"),
        (NAME, ""),
        (NAME + "NCCL WARN Connect to 10.0.0.1 failed\n", NAME),
        ("iteration 1/ 9 | lm_loss: 2.0E+00 |\n" + NAME,) * 2,
        (TRACE.format(3) + "OSError: [Errno 5] Input/output error\n",) * 2,
        (TRACE.format(3) + "torch.distributed.DistStoreError: Timed out\n",) * 2,
        (TRACE.format(3) + "torch.OutOfMemoryError: CUDA out of memory.\n",) * 2,
        ("WARNING: No module named 'transformer_engine'\n",) * 2,
    ],
)
def test_other_ends_are_no_proof_that_it_comes_again(queued, first, second):
    assert [start(queued, 1, first), start(queued, 2, second), start(queued, 3, "")] == ["run"] * 3


def test_a_new_checkpoint_in_between_is_progress(queued):
    assert start(queued, 1, NAME) == "run"
    queued.save(10)
    assert start(queued, 2, NAME) == "run"
    assert start(queued, 3, NAME) == "run"


def test_a_requeue_counts_as_a_start_and_reads_its_own_part_of_the_log(queued):
    for restart in (0, 1):
        queued.begin(1, job="101", restart=restart)
        log(queued, 101, NAME if restart else "x\n" * 500_000 + NAME, restart)
        queued.end(1, job="101", restart=restart)
    assert queued.begin(1, job="101", restart=2)["decision"] == "gave_up"


@pytest.mark.parametrize(
    ("text", "code", "lines"),
    [
        (
            "[rank3]: " + NAME.replace("\n", "\n[rank3]: "),
            1,
            ["NameError: name 'modle' is not defined"],
        ),
        (
            "usage: t.py\nt.py: error: unrecognized arguments: --lr\n",
            2,
            ["t.py: error: unrecognized arguments: --lr"],
        ),
        (
            "bash: line 1: pyhton3: command not found\n",
            127,
            ["bash: line #: pyhton#: command not found"],
        ),
        (
            "python3: can't open file '/w/trian.py': [Errno 2] No such file or directory\n",
            2,
            ["python#: can't open file '/w/trian.py': [Errno #] No such file or directory"],
        ),
        ("", 2, ["exit code 2"]),
        ("", 1, []),
        (
            NAME
            + TRACE.format(1)
            + "torch.distributed.elastic.ChildFailedError: train.py FAILED\n",
            1,
            ["NameError: name 'modle' is not defined"],
        ),
        ("\x1b[31m" + NAME, 1, ["NameError: name 'modle' is not defined"]),
        ("\xff\x00" * 9, 1, []),
    ],
)
def test_the_lines_that_tell(text, code, lines):
    assert startup.lines_of(text.encode("latin-1"), code) == lines


def test_a_signal_a_missing_log_and_an_odd_log_tell_nothing(tmp_path):
    (tmp_path / "logs" / "r-7.out").mkdir(parents=True)
    assert startup.repeatable(str(tmp_path), "r", "7", 2) == []
    assert startup.repeatable(str(tmp_path), "r", "8", 2) == []
    assert startup.repeatable(str(tmp_path), "r", "../8", 2) == []
    assert startup.repeatable(str(tmp_path), "r", "8", 137) == []
