"""What a rehearsed chain did, as rows, as a bar of text and as a picture; times are scaled back to
the site's. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpctrain.base.paths import filled
from hpctrain.base.units import format_time
from hpctrain.plan.make import Plan
from hpctrain.sandbox.rehearse.records import Attempt

WIDTH = 60
_PICTURE_WIDTH = 960
_COLOUR = {
    "finetune": "#3d7ab5",
    "scratch": "#3d7ab5",
    "resume": "#4d9a62",
    "lost": "#c9524a",
    "other": "#9a9a9a",
}


@dataclass(frozen=True)
class Bar:
    """One start of a link, or a link that ended at once. Iterations are numbers of checkpoint
    folders.

    `took_s` and `gpu_hours` are in the site's time; `waited_s` is what the job waited in this empty
    sandbox.
    """

    link: int
    job_id: str
    restart: int
    mode: str
    outcome: str
    first: int
    last: int
    kept: int
    lost: int
    checkpoint: str
    start_s: float
    took_s: float
    gpu_hours: float
    waited_s: float
    stage: str = ""

    @property
    def end_s(self) -> float:
        return self.start_s + self.took_s

    @property
    def label(self) -> str:
        return f"{self.stage + ' ' if self.stage else ''}link {self.link}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bars(
    plan: Plan,
    attempts: Sequence[Attempt],
    links: Sequence[Mapping[str, Any]],
    states: Mapping[str, str],
    waited_s: Mapping[str, float],
    scenario: Mapping[str, Any],
) -> list[Bar]:
    """The starts of all links in their order. What a start kept is what the next one begins from,
    or what it saved last."""
    begins = [record for record in links if record.get("event") == "begin"]
    by_key = {(attempt.job_id, attempt.restart): attempt for attempt in attempts}
    found: list[Bar] = []
    clock = 0.0
    for record in begins:
        key = str(record.get("job_id")), int(record.get("restart") or 0)
        attempt, mode = by_key.get(key), str(record.get("mode"))
        begin = (
            int(record.get("iteration") or 0)
            if mode in ("resume", "done") or scenario["counts_on"]
            else 0
        )
        if attempt is None or attempt.last("start") is None:
            outcome = (
                mode
                if mode in ("done", "stopped", "gave_up")
                else states.get(key[0], "did not start").lower()
            )
            found.append(
                Bar(
                    int(record["link"]),
                    *key,
                    mode,
                    outcome,
                    begin,
                    begin,
                    begin,
                    0,
                    str(record.get("checkpoint") or ""),
                    clock,
                    0.0,
                    0.0,
                    waited_s.get(key[0], 0.0),
                )
            )
            continue
        reached = max(
            [begin, *(int(fields["number"]) for _, fields in attempt.events if "number" in fields)]
        )
        saved = attempt.last("saved")
        kept = max(begin, int(saved["number"])) if saved else begin
        if scenario["layout"] == "none" and attempt.last("end"):
            kept = reached  # it saves what it makes in a way of its own
        num_saves = sum(1 for _, fields in attempt.events if fields.get("event") == "saved")
        took_s = (reached - begin) * scenario["step_time_s"] + num_saves * scenario["save_time_s"]
        gpus = plan.spec.num_nodes * plan.gpus_per_node
        found.append(
            Bar(
                int(record["link"]),
                *key,
                mode,
                outcome_of(attempt, states.get(key[0], "")),
                begin,
                reached,
                kept,
                reached - kept,
                str(record.get("checkpoint") or ""),
                clock,
                took_s,
                gpus * took_s / 3600,
                waited_s.get(key[0], 0.0),
            )
        )
        clock += took_s
    return found


def of_stages(found: Sequence[tuple[str, str | None, Sequence[Bar]]]) -> list[Bar]:
    """The bars of all stages of a pipeline on one clock. `found`: (stage, the one it is from, its
    bars), in order."""
    ends: dict[str | None, float] = {}
    out = []
    for stage, source, own in found:
        shifted = [
            replace(bar, stage=stage, start_s=bar.start_s + ends.get(source, 0.0)) for bar in own
        ]
        ends[stage] = max((bar.end_s for bar in shifted), default=ends.get(source, 0.0))
        out += shifted
    return out


def outcome_of(attempt: Attempt, state: str) -> str:
    """In a word, how one start ended."""
    for event, word in (
        ("end", "done"),
        ("strike", "node failed"),
        ("kill", "killed in a save"),
        ("left", "saved and left"),
        ("limit", "time limit"),
    ):
        if attempt.last(event):
            return word
    return state.lower() or "unknown"


def text(found: Sequence[Bar]) -> list[str]:
    """One line per bar: where in the run's time it ran, `=` what it kept and `x` what it lost."""
    total = max((bar.end_s for bar in found), default=0.0)
    lines = []
    width = max([9, *(len(bar.label) + 3 for bar in found if bar.stage)])
    for bar in found:
        left, kept, lost = (round(WIDTH * part / total) if total else 0 for part in _parts(bar))
        if bar.took_s and not kept + lost:
            kept = 1
        picture = " " * left + "=" * kept + "x" * lost
        label = bar.label + (f".{bar.restart}" if bar.restart else "")
        lines.append(
            f"{label:{width}}|{picture[:WIDTH]:{WIDTH}}| {bar.mode}, {bar.first} -> {bar.kept},"
            f" {bar.outcome}"
        )
    return lines


def svg(found: Sequence[Bar], title: str) -> str:
    """The same as a picture that needs nothing but a browser."""
    total = max((bar.end_s for bar in found), default=0.0) or 1.0
    left = 120 + 8 * max((len(bar.stage) for bar in found), default=0)
    scale = (_PICTURE_WIDTH - left - 20) / total
    return filled(
        "sandbox",
        "timeline.svg",
        bars=[(bar, *(part * scale for part in _parts(bar))) for bar in found],
        colours=_COLOUR,
        left=left,
        time=format_time(round(total)),
        title=title,
        width=_PICTURE_WIDTH,
    )


def _parts(bar: Bar) -> tuple[float, float, float]:
    """(when it began, time of what it kept, time of what it lost), in seconds."""
    done = max(bar.last - bar.first, 1)
    lost_s = bar.took_s * bar.lost / done
    return bar.start_s, bar.took_s - lost_s, lost_s
