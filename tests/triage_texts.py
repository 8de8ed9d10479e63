"""Logs made on the spot, and what triage says of them."""

from __future__ import annotations

from hpctrain.triage.engine import Engine
from hpctrain.triage.judge import judge
from hpctrain.triage.rules import Circumstances
from hpctrain.triage.thresholds import Thresholds


def diagnose(
    text: bytes,
    around: Circumstances | None = None,
    thresholds: Thresholds | None = None,
    **options,
):
    engine = Engine(thresholds, **options)
    reader = engine.log("x.log")
    reader.feed(text)
    reader.close()
    return judge(engine, around)


def verdicts(diagnosis):
    return {verdict.rule: verdict.verdict for verdict in diagnosis.verdicts}


STEP = (
    " iteration {i:8d}/{n:8d} | elapsed time per iteration (ms): 1000.0 | learning rate: 1.0E-05 |"
    " lm_loss: {loss:.6E} | grad norm: {norm} | number of skipped iterations:   0 | number of nan"
    " iterations:   0 |\n"
)


def steps(count, loss=lambda i: 2.5 - 0.01 * i, norm=lambda i: 1.0, first=1, total=1000):
    return "".join(
        STEP.format(i=i, n=total, loss=loss(i), norm=norm(i)) for i in range(first, first + count)
    ).encode()
