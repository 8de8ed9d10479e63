"""When a chain is over: the target is reached, somebody stops it, or it stands still."""

from __future__ import annotations

import json
import os

from hpctrain.runtime import history


def test_done_cancels_the_successors_and_not_itself(run):
    run.save(300)
    ledger = [
        {"event": "submitted", "link": link, "job_id": str(40 + link), "depends_on": None}
        for link in range(1, 5)
    ]
    ledger.append({"event": "cancelled", "link": 4, "job_id": "44"})
    (run.dir / "ledger.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in ledger) + '{"event": "subm'
    )
    assert run.begin(2, job="42")["decision"] == "done"
    assert run.scancelled.read_text().split() == ["43"]
    assert run.records("ledger.jsonl".replace("ledger", "links"))[-1]["mode"] == "done"
    lines = (run.dir / "ledger.jsonl").read_text().splitlines()
    assert lines[-2] == '{"event": "subm'
    assert json.loads(lines[-1])["event"] == "cancelled"


def test_stop_is_obeyed_before_anything_is_touched(quick):
    quick.base()
    (quick.dir / "STOP").write_text("")
    assert quick.begin(1)["decision"] == "stopped"
    assert not os.path.lexists(quick.ckpt / "latest")


def test_done_wins_over_stop_and_over_giving_up(quick):
    for number in (1, 2, 3):
        quick.link(number)
    quick.save(300)
    (quick.dir / "STOP").write_text("")
    assert quick.begin(4)["decision"] == "done"


def test_the_chain_gives_up_after_links_without_progress_and_says_why(quick):
    assert [quick.link(number)["decision"] for number in range(1, 5)] == [
        "run",
        "run",
        "run",
        "gave_up",
    ]
    assert "3 links in a row" in quick.records()[6]["reason"]
    quick.save(10)  # progress after all
    assert quick.link(5)["mode"] == "resume"


def test_progress_resets_the_count(quick):
    for number in range(1, 9):
        assert quick.link(number)["decision"] == "run"
        if number % 2 == 0:
            quick.save(number)


def test_a_link_submitted_after_the_chain_gave_up_tries_again(quick):
    ledger = [
        {"event": "submitted", "link": link, "job_id": str(100 + link)} for link in range(1, 6)
    ]
    (quick.dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    assert [quick.link(number)["decision"] for number in (1, 2, 3, 4, 5)][-2:] == [
        "gave_up",
        "gave_up",
    ]
    assert [quick.link(number)["decision"] for number in (6, 7, 8, 9)] == [
        "run",
        "run",
        "run",
        "gave_up",
    ]


def test_starts_from_before_a_link_was_queued_do_not_count_against_it(quick):
    for number in (1, 2, 3):
        quick.link(number)  # a person has seen these three when the next two are queued
    seen = history.last_start(quick.records())
    ledger = [
        {"event": "submitted", "link": link, "job_id": str(100 + link), "last_start": seen}
        for link in (4, 5, 6, 7)
    ]
    (quick.dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    assert [quick.link(number)["decision"] for number in (4, 5, 6, 7)] == [
        "run",
        "run",
        "run",
        "gave_up",
    ]


def test_a_record_that_names_a_start_which_is_no_more_counts_all(quick):
    ledger = [{"event": "submitted", "link": 4, "job_id": "104", "last_start": "9.0"}]
    (quick.dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    assert [quick.link(number)["decision"] for number in (1, 2, 3, 4)][-1] == "gave_up"


def test_requeues_of_one_link_count_as_one_until_they_are_a_crash_loop(quick):
    decisions = [quick.begin(1, restart=restart)["decision"] for restart in range(10)]
    assert decisions == ["run"] * 9 + ["gave_up"]


def test_a_link_that_made_the_checkpoint_before_its_requeue_is_not_one_without_progress(quick):
    quick.begin(1, job="101")
    quick.save(10)
    quick.begin(1, job="101", restart=1)
    assert [quick.link(number)["decision"] for number in (2, 3, 4, 5)] == [
        "run",
        "run",
        "run",
        "gave_up",
    ]


def test_a_requeue_keeps_its_link_number_and_a_hand_submitted_job_gets_the_next(quick):
    (quick.dir / "ledger.jsonl").write_text(
        json.dumps({"event": "submitted", "link": 4, "job_id": "70"}) + "\n"
    )
    assert quick.begin(job="70")["link"] == "4"
    assert quick.begin(job="70", restart=1)["link"] == "4"
    assert quick.begin(job="71")["link"] == "5"


def test_layout_none_is_done_when_an_earlier_link_ended_well(quick):
    quick.write_plan(layout="none", checkpoint_dir=None)
    assert quick.begin(1)["mode"] == "scratch"
    quick.end(0)
    (quick.dir / "ledger.jsonl").write_text('{"event": "submitted", "link": 2, "job_id": "8"}\n')
    assert quick.begin(2, job="8")["decision"] == "done"


def test_layout_none_runs_again_whenever_it_is_submitted_by_hand(quick):
    quick.write_plan(layout="none", checkpoint_dir=None)
    for number in range(1, 7):
        assert quick.begin(number, job=str(number))["decision"] == "run"
        quick.end(number % 2)
