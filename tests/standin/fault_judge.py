"""Judges one chain of the fault campaign by what really happened, which the trainer notes outside
the checkpoint folder."""

from __future__ import annotations

import html
import json
import re
import sys
from typing import TYPE_CHECKING

import checkpoints
import saves
from fault_kinds import NOT_BY_STATUS, TOLD

if TYPE_CHECKING:
    from fault_run import Result, Run

PAGE = (
    "import sys; from hpctrain.runs.report.gather import gather; from hpctrain.runs.report.page"
    " import page;print(page(gather(sys.argv[1]), '', None))"
)


def judge(run: Run, result: Result) -> None:
    """What this program promises, checked against what really happened."""
    wrong, events = result.wrong, run.events()
    result.played += [
        event["how"] or event["kind"] for event in events if event["event"] == "fault"
    ]
    links = (
        [json.loads(line) for line in (run.dir / "links.jsonl").read_text().splitlines()]
        if (run.dir / "links.jsonl").exists()
        else []
    )
    begins = [record for record in links if record["event"] == "begin"]
    starts = [event for event in events if event["event"] == "start"]
    result.links, result.starts = len({record["link"] for record in begins}), len(starts)
    whole = _judge_order(run, events, result)
    if run.steps in whole.values():
        result.outcome = "reached"
        tag = next(tag for tag, step in whole.items() if step == run.steps)
        optimizer_steps = saves.values_of(str(run.ckpt / tag))[0]["optimizer_steps"]
        if optimizer_steps != run.steps:
            wrong.append(f"the optimizer saw {optimizer_steps} of {run.steps} steps")
    elif begins and begins[-1]["mode"] == "gave_up":
        result.outcome = "gave up"
        # True when the last links that began, as many as it takes, really left no whole checkpoint
        # behind.
        trained = [
            record for record in begins if record["mode"] in ("scratch", "finetune", "resume")
        ]
        last = list(dict.fromkeys(record["job_id"] for record in trained))[-3:]
        made = [
            event
            for event in events
            if event["event"] == "wrote"
            and event["tag"] in whole
            and event["attempt"].split(".")[0] in last
        ]
        if len(last) < 3 or made:
            wrong.append(f"gave up without a reason: jobs {last}, {made}")
    else:
        result.outcome = "neither"
        wrong.append(f"neither reached nor gave up: {[(r['link'], r['mode']) for r in begins]}")
    wrong += [
        f"{event['event']}: {event}"
        for event in events
        if event["event"] in ("mixed", "random_weights")
    ]
    result.untold = untold(run, result.played)
    if jobs := run.jobs():
        wrong.append(f"jobs left queued: {jobs}")
    for name, before in run.precious.items():
        if checkpoints.snapshot(run.top / name) != before:
            wrong.append(f"`{name}` changed")
    if (run.top / "precious.txt").read_text() != "not to be touched":
        wrong.append("a file outside changed")


def untold(run: Run, played) -> list[str]:
    """The faults that were played and that nobody would learn of from what each verb says."""
    said = {
        "status": run.hpctrain("status", str(run.dir)),
        "triage": run.hpctrain("triage", str(run.dir)),
        "report": run.cluster.run(sys.executable, "-c", PAGE, str(run.dir), cwd=run.top),
    }
    texts = {}
    for verb, done in said.items():
        texts[verb] = html.unescape(done.stdout + done.stderr)
        (run.top / f"{verb}.txt").write_text(texts[verb])
    return [
        f"{verb} does not tell of {kind}"
        for kind in played
        for verb in texts
        if not (verb == "status" and kind in NOT_BY_STATUS)
        and not re.search(TOLD[kind], texts[verb])
    ]


def _judge_order(run: Run, events, result):
    """Each start is from the last whole checkpoint before it, and no two starts ever train at the
    same time.

    Returns the whole checkpoints that are left, with their steps.
    """
    wrote: dict[tuple[str, str], set[int]] = {}
    whole: dict[str, int] = {}
    current, reached = None, 0
    for event in events:
        if event["event"] == "wrote":
            ranks = wrote.setdefault((event["attempt"], event["tag"]), set())
            ranks.add(event["rank"])
            if len(ranks) == 2:
                whole[event["tag"]] = event["step"]
        elif event["event"] == "hurt":
            whole.pop(event["tag"], None)
        elif event["event"] == "start":
            best = max(whole.values(), default=0)
            if event["iteration"] != best:
                result.wrong.append(
                    f"started from {event['iteration']}, the last whole checkpoint is {best}"
                )
            if (event["mode"] == "resume") != bool(whole):
                result.wrong.append(f"mode {event['mode']} with whole checkpoints {sorted(whole)}")
            result.lost_iterations += max(reached - event["iteration"], 0)
            current, reached = event["attempt"], event["iteration"]
        elif event["event"] == "step":
            if event["attempt"] != current:
                result.wrong.append(f"{event['attempt']} trained while {current} did")
            reached = event["iteration"]
    return whole
