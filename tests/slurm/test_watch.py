"""The watcher on a real Slurm: a step that is stuck costs a few of its steps, and not the link."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slurm

FAST = {"HPCTRAIN_WATCH_S": "0.3", "HPCTRAIN_HANG_S": "5"}


def stuck(chain):
    return chain.records(event="watch", mode="stuck")


def test_a_step_that_is_stuck_is_ended_and_the_next_link_goes_on(make):
    chain = make(steps=1000, more=["--step-s", "0.5"], chain={"jobs": 2})
    chain.ok("chain", **FAST)
    chain.wait(lambda chain: len(chain.happened("step")) > 12)
    with chain.held("saved"):
        chain.wait(stuck)
        chain.wait(lambda chain: chain.records(event="end"))
    chain.wait(lambda chain: len(chain.records(event="begin")) == 2)
    (told,) = stuck(chain)
    first, second = chain.records(event="begin")
    (end,) = chain.records(event="end")
    assert told["link"] == 1 and told["job_id"] == first["job_id"]
    assert end["exit_code"] not in (0, None)
    assert second["mode"] == "resume"
    log = (chain.dir / "logs" / f"ft-{first['job_id']}.out").read_text()
    assert "the step ends now: no word for" in log
    assert "the watcher of link 1 at " in chain.hpctrain("status", "ft").stderr
    stacks = (chain.dir / "stacks" / f"{first['job_id']}.txt").read_text()
    assert "==" in stacks
    chain.ok("cancel", "ft")


def test_off_leaves_a_step_that_is_stuck_alone(make):
    chain = make(steps=1000, more=["--step-s", "0.5"], watch="off")
    chain.ok("chain", **FAST)
    chain.wait(lambda chain: len(chain.happened("step")) > 12)
    with chain.held("step"):
        with pytest.raises(AssertionError):
            chain.wait(stuck, 12)
    chain.ok("cancel", "ft")
