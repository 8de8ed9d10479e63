"""Arithmetic of a run: what it is billed, how often it should save, how many links it needs.
Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpctrain.config.site import Partition

# Failures per 1000 node-days. Meta RSC-1, 16k A100 over 11 months (arXiv 2410.21680): 6.5; RSC-2:
# 2.34.
FAILURES_PER_1000_NODE_DAYS = 6.5


@dataclass(frozen=True)
class Cost:
    """What one job is billed when it runs its whole wall time."""

    node_hours: float
    gpu_hours: float
    billed: float | None
    unit: str
    formula: str


def cost(
    partition: Partition | None,
    num_nodes: int,
    cores_per_node: int,
    memory_gib_per_node: float,
    gpus_per_node: int,
    time_s: int,
) -> Cost:
    """The bill of one job. `gpu_hours` counts GPUs as Slurm does; `billed` is in the site's unit,
    None when unknown."""
    hours = time_s / 3600
    node_hours, gpu_hours = num_nodes * hours, num_nodes * gpus_per_node * hours
    billing = partition.billing if partition else None
    if not billing:
        return Cost(
            node_hours, gpu_hours, None, "", "the profile does not say how this partition is billed"
        )
    unit = billing["unit"]
    if billing["per_node_hour"] is not None:
        rate = billing["per_node_hour"]
        return Cost(
            node_hours,
            gpu_hours,
            rate * node_hours,
            unit,
            f"{rate:g} x {num_nodes} nodes x {hours:g} h",
        )
    size = billing["slice"]
    used = {"cores": cores_per_node, "memory_gib": memory_gib_per_node, "gpus": gpus_per_node}
    slices = {key: math.ceil(used[key] / size[key]) for key in used if size.get(key)}
    largest = max(slices, key=lambda key: slices[key]) if slices else "nodes"
    per_node = slices.get(largest, 1)
    rate = billing["per_slice_hour"]
    formula = (
        f"{rate:g} x {num_nodes} nodes x {per_node} slices a node (by {largest}) x {hours:g} h"
    )
    return Cost(node_hours, gpu_hours, rate * num_nodes * per_node * hours, unit, formula)


def mean_time_to_failure_s(num_nodes: int, rate: float = FAILURES_PER_1000_NODE_DAYS) -> float:
    """Expected time until some node of the job fails, at `rate` failures per 1000 node-days."""
    return 1000 * 86400 / (rate * max(num_nodes, 1))


def young_daly_s(save_time_s: float, mttf_s: float) -> float:
    """The checkpoint interval that loses least: sqrt(2 * T_save * MTTF) (Young 1974, Daly 2006)."""
    return math.sqrt(2 * save_time_s * mttf_s)


def links_needed(
    iterations: int,
    step_time_s: float,
    save_every: int | None,
    time_s: int,
    lead_s: int = 0,
    saves_on_signal: bool = False,
) -> int | None:
    """Links of `time_s` until `iterations` are saved; None when a link never reaches a checkpoint.

    A link keeps what it saved: whole multiples of `save_every`, or all it did where it saves on the
    signal.
    """
    per_link = int(max(time_s - lead_s, 0) / step_time_s)
    kept = per_link if saves_on_signal or not save_every else per_link // save_every * save_every
    if per_link >= iterations:
        return 1
    return math.ceil(iterations / kept) if kept > 0 else None
