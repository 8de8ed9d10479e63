"""How long a step takes where nobody has measured this run: a range from other people's runs of the
same kind on the same GPU, and nothing where there are none. Pure.

A step of T tokens takes T x FLOP / (GPUs x peak x MFU); a token costs 6 FLOP a parameter and 6 x
layers x width x sequence for attention (Kaplan et al. 2020; PaLM, appendix B). For mixtures of
experts nothing is said: such estimates are wrong by factors (docs/memory.md).
"""

from __future__ import annotations

from typing import NamedTuple

from hpctrain.base.units import format_duration
from hpctrain.config.decision import Decision
from hpctrain.recipes.contract import Context
from hpctrain.recipes.memory import Layout, Shape


class Measured(NamedTuple):
    """The share of a GPU's peak (bf16, dense) that runs of one kind reached: 10th to 90th
    percentile of `source`."""

    peak_tflops: float
    lowest: float
    highest: float
    source: str


MEASURED = {
    ("mi250", "megatron"): Measured(191.5, 0.16, 0.26, "five 175B runs of Megatron on MI250X"),
    ("a100", "megatron"): Measured(312, 0.24, 0.37, "BigScience's Megatron runs on A100"),
    ("a100", "hf"): Measured(312, 0.43, 0.54, "full tuning with HF and FSDP on A100"),
}


def pace(
    context: Context, shape: Shape, layout: Layout, rows: int, iterations: int | None
) -> tuple[Decision, ...]:
    """The range for a step of `rows` sequences, and for all iterations; empty where the run states
    a time of its own, or nothing like it was measured."""
    kind = "megatron" if layout.style in ("megatron", "mds") else layout.style
    gpu = str(context.node_type.gpu_type or "").lower()
    known = next(
        (m for (name, k), m in MEASURED.items() if gpu.startswith(name) and k == kind), None
    )
    stated = context.spec.step_time_s or layout.adapters is not None or shape.experts
    if known is None or stated or not context.gpus_per_node:
        return ()
    tokens = rows * layout.length
    flop = 6 * shape.parameters + 6 * shape.layers * shape.query * layout.length
    at_peak_s = tokens * flop / (layout.gpus * known.peak_tflops * 1e12)
    fast, slow = at_peak_s / known.highest, at_peak_s / known.lowest
    share = f"MFU {known.lowest:g} to {known.highest:g}, {known.source}"
    why = f"not measured: {tokens:,} tokens a step, {share}; `hpctrain ladder` measures it"
    found = [Decision("estimate.step_time", f"{fast:.3g} to {slow:.3g} s", why)]
    if iterations:
        times = f"{format_duration(iterations * fast)} to {format_duration(iterations * slow)}"
        hours = iterations * layout.gpus / 3600
        gpu_hours = f"{hours * fast:,.0f} to {hours * slow:,.0f} GPU-hours"
        words = f"{iterations:,} iterations of {tokens:,} tokens; {gpu_hours}"
        found.append(Decision("estimate.training_time", times, words))
    return tuple(found)
