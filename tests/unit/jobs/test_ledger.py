"""The ledger: a line before each sbatch and one after, so that a rerun neither loses nor doubles a
link."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from hpctrain.base.errors import EnvironmentFault, Refused
from hpctrain.jobs.ledger import (
    MAIN,
    SIDE,
    Submission,
    only_one,
    read_ledger,
    record_cancelled,
    submit_all,
)
from hpctrain.runs.records import word_in_tags


def links(*numbers, side=()):
    out = []
    for number in numbers:
        out.append(Submission(number, MAIN, "job.sbatch", (str(number),), ("--exclude=n1",)))
        if number in side:
            out.append(Submission(number, SIDE, f"side/after-{number}.sbatch", ()))
    return out


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def dependency(words):
    return next(
        (word.rpartition(":")[2] for word in words if word.startswith("--dependency=afterany:")),
        None,
    )


def test_each_link_waits_for_the_one_before_it_and_its_side_job_for_it(cluster, run_dir):
    ids = submit_all(str(run_dir), links(1, 2, 3, side=(1, 2)))
    assert ids == {
        (1, MAIN): "100",
        (1, SIDE): "101",
        (2, MAIN): "102",
        (2, SIDE): "103",
        (3, MAIN): "104",
    }
    assert [dependency(words) for words in cluster.submitted] == [None, "100", "100", "102", "102"]
    first = cluster.submitted[0]
    assert (
        first[0] == "--parsable" and first[-2:] == ["job.sbatch", "1"] and "--exclude=n1" in first
    )
    assert (
        cluster.submitted[1][-1] == "side/after-1.sbatch"
        and "--exclude=n1" not in cluster.submitted[1]
    )


def test_a_line_before_and_one_after_tell_all_of_each_job(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2))
    one, two, three, four = records(run_dir)
    assert [one["event"], two["event"], three["event"], four["event"]] == [
        "submitting",
        "submitted",
    ] * 2
    assert (one["job_id"], two["job_id"], one["link"], one["kind"]) == (None, "100", 1, MAIN)
    assert (one["depends_on"], three["depends_on"], four["depends_on"]) == (None, "100", "100")
    prefix, uid, link, kind, _ = one["tag"].split(":")
    assert (prefix, link, kind) == ("hpctrain", "1", MAIN) and len(uid) == 12
    assert three["tag"].split(":")[1] == uid and three["tag"] != one["tag"]
    assert cluster.jobs["100"]["comment"] == one["tag"]
    ledger = read_ledger(str(run_dir))
    assert word_in_tags(ledger.records) == uid and ledger.submitted() == {
        (1, MAIN): "100",
        (2, MAIN): "101",
    }
    assert ledger.open() == {} and ledger.links() == {1, 2} and ledger.cancelled() == set()


def test_what_is_on_record_is_not_submitted_again(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2))
    ids = submit_all(str(run_dir), links(1, 2, 3))
    assert ids == {(1, MAIN): "100", (2, MAIN): "101", (3, MAIN): "102"}
    assert len(cluster.submitted) == 3 and dependency(cluster.submitted[2]) == "101"
    assert word_in_tags(records(run_dir)) == records(run_dir)[-1]["tag"].split(":")[1]


def test_nobody_waits_for_a_job_that_has_ended(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2))
    cluster.change("100", state="COMPLETED")
    cluster.change("101", state="FAILED")
    submit_all(str(run_dir), links(1, 2, 3))
    assert dependency(cluster.submitted[2]) is None
    cluster.change("102", forgotten=True)
    submit_all(str(run_dir), links(3, 4))
    assert dependency(cluster.submitted[3]) is None and records(run_dir)[-1]["depends_on"] is None


def test_a_link_between_ended_ones_is_still_waited_for(cluster, run_dir):
    """Link 1 runs on, link 2 was cancelled: link 3 waits for link 1."""
    submit_all(str(run_dir), links(1, 2))
    cluster.change("101", state="CANCELLED")
    submit_all(str(run_dir), links(1, 2, 3))
    assert dependency(cluster.submitted[2]) == "100"


def test_the_first_link_may_wait_for_another_runs_job(cluster, run_dir):
    other = submit_all(str(run_dir), links(1))[1, MAIN]
    folder = run_dir.parent / "next"
    folder.mkdir()
    submit_all(str(folder), links(1, 2), after=other)
    assert [dependency(words) for words in cluster.submitted[1:]] == ["100", "101"]
    cluster.change(other, state="COMPLETED")
    third = run_dir.parent / "third"
    third.mkdir()
    submit_all(str(third), links(1), after=other)
    assert dependency(cluster.submitted[3]) is None


def test_what_slurm_took_before_it_refused_is_on_record_and_the_rest_follows(cluster, run_dir):
    cluster.refuse_after(2)
    with pytest.raises(EnvironmentFault, match="QOSMaxSubmitJobPerUserLimit"):
        submit_all(str(run_dir), links(1, 2, 3))
    ledger = read_ledger(str(run_dir))
    assert ledger.submitted() == {(1, MAIN): "100", (2, MAIN): "101"}
    # Slurm has said that it has not got it, so nothing about it is open.
    assert ledger.open() == {} and records(run_dir)[-1]["event"] == "refused"
    cluster.refuse_after(None)
    assert submit_all(str(run_dir), links(1, 2, 3))[3, MAIN] == "102"
    assert len(cluster.jobs) == 3 and read_ledger(str(run_dir)).open() == {}


def cut_off_after_sbatch(run_dir):
    """The ledger as a crash between sbatch and the second line leaves it."""
    lines = (run_dir / "ledger.jsonl").read_text().splitlines(True)
    (run_dir / "ledger.jsonl").write_text("".join(lines[:-1]))


def test_a_job_whose_record_was_cut_off_is_found_by_its_tag(cluster, run_dir, capsys):
    submit_all(str(run_dir), links(1, 2))
    cut_off_after_sbatch(run_dir)
    assert list(read_ledger(str(run_dir)).open()) == [(2, MAIN)]
    assert submit_all(str(run_dir), links(1, 2, 3)) == {
        (1, MAIN): "100",
        (2, MAIN): "101",
        (3, MAIN): "102",
    }
    assert (
        len(cluster.submitted) == 3
        and "link 2 was submitted before as job 101" in capsys.readouterr().err
    )
    assert read_ledger(str(run_dir)).open() == {}


def test_a_job_that_began_meanwhile_and_left_the_queue_is_found_by_its_start(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2))
    cut_off_after_sbatch(run_dir)
    cluster.change("101", forgotten=True)
    begin = {"event": "begin", "link": 2, "job_id": "101", "restart": 0, "mode": "scratch"}
    (run_dir / "links.jsonl").write_text(json.dumps(begin) + "\n")
    assert submit_all(str(run_dir), links(1, 2))[2, MAIN] == "101" and len(cluster.submitted) == 2


def test_a_start_of_another_job_on_record_is_not_taken_for_it(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2))
    cut_off_after_sbatch(run_dir)
    cluster.change("101", forgotten=True)
    begin = {"event": "begin", "link": 2, "job_id": "100", "restart": 0, "mode": "scratch"}
    (run_dir / "links.jsonl").write_text(json.dumps(begin) + "\n")
    assert submit_all(str(run_dir), links(1, 2))[2, MAIN] == "102"


def test_a_job_that_slurm_never_got_is_submitted(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2))
    cut_off_after_sbatch(run_dir)
    cluster.change("101", comment="somebody else's")
    assert submit_all(str(run_dir), links(1, 2))[2, MAIN] == "102"


def test_a_torn_or_foreign_line_spoils_only_itself(cluster, run_dir):
    submit_all(str(run_dir), links(1))
    with (run_dir / "ledger.jsonl").open("a") as file:
        file.write(
            '{"event": "note"}\n[1]\n{"event": "submitted", "link": "x", "job_id": "9"}\n{"event":'
            ' "subm'
        )
    ledger = read_ledger(str(run_dir))
    assert ledger.submitted() == {(1, MAIN): "100"} and ledger.links() == {1}
    assert submit_all(str(run_dir), links(1, 2))[2, MAIN] == "101"


def test_an_empty_ledger(run_dir):
    ledger = read_ledger(str(run_dir))
    assert (ledger.submitted(), ledger.open(), ledger.links()) == ({}, {}, set())


def test_cancelled_jobs_are_noted_with_what_they_were(cluster, run_dir):
    submit_all(str(run_dir), links(1, 2, side=(2,)))
    record_cancelled(str(run_dir), ["101", "102", "999"])
    assert read_ledger(str(run_dir)).cancelled() == {"101", "102", "999"}
    noted = [(one["link"], one["kind"], one["job_id"]) for one in records(run_dir)[-3:]]
    assert noted == [(2, MAIN, "101"), (2, SIDE, "102"), (0, MAIN, "999")]


def test_a_ledger_that_cannot_be_written_stops_before_anything_is_submitted(cluster, run_dir):
    (run_dir / "ledger.jsonl").mkdir()
    with pytest.raises((EnvironmentFault, OSError)):
        submit_all(str(run_dir), links(1))
    assert cluster.submitted == []


def _hold(run_dir, ready, done):
    with only_one(run_dir):
        ready.set()
        done.wait(30)


def test_two_cannot_submit_for_one_run_at_once(run_dir):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(run_dir), ready, done))
    other.start()
    assert ready.wait(30)
    with (
        pytest.raises(Refused, match="another hpctrain is submitting jobs"),
        only_one(str(run_dir)),
    ):
        pass
    done.set()
    other.join(30)
    with only_one(str(run_dir)):
        pass
