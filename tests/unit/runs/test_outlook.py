"""What a chain's own jobs say of how long the rest takes."""

from __future__ import annotations

import json

from hpctrain.runs.outlook import outlook


def event(kind, link, iteration, minute):
    return {
        "event": kind,
        "link": link,
        "job_id": str(link),
        "restart": 0,
        "mode": "resume",
        "iteration": iteration,
        "time": f"2026-01-01T00:{minute:02d}:00Z",
    }


def written(folder, *events):
    (folder / "plan.json").write_text(json.dumps({"guard": {}, "job": {}}))
    (folder / "links.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return str(folder)


def test_what_is_left_goes_by_the_jobs_that_ended(tmp_path):
    run = written(tmp_path, event("begin", 1, 0, 0), event("end", 1, 100, 10))
    said = outlook(run, 400)

    # 600 s for 100 iterations, 300 are left
    assert "6 s an iteration" in said and "the 300 that are left take 30m" in said


def test_nothing_is_said_where_nothing_was_measured(tmp_path):
    assert outlook(str(tmp_path), 400) == ""
    assert outlook(written(tmp_path, event("begin", 1, 0, 0)), 400) == ""
    done = (event("begin", 1, 0, 0), event("end", 1, 100, 10))
    assert outlook(written(tmp_path, *done), None) == ""
