"""Ranks and batch: train_batch_size = micro batch x accumulation x data-parallel size, with the
arithmetic shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpctrain.config.decision import Decision
from hpctrain.recipes.neox.draft import RUN, Draft
from hpctrain.recipes.rules import Rule

_TRAIN, _MICRO, _STEPS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
IDENTITY = f"{_TRAIN} = {_MICRO} x {_STEPS} x data-parallel size"


@dataclass(frozen=True)
class Shape:
    """How the ranks are split. `pipeline` is NeoX's own number, where 0 means a sequential model
    and counts as 1."""

    nodes: int
    ranks_per_node: int
    tensor: int
    pipeline: int
    data: int | None

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def stages(self) -> int:
        return max(self.pipeline, 1)

    @property
    def formula(self) -> str:
        return (
            f"{self.nodes} nodes x {self.ranks_per_node} ranks = {self.world}, / pipeline"
            f" {self.stages} / tensor {self.tensor}"
        )


def decide_shape(draft: Draft, nodes: int, ranks_per_node: int, where_nodes: str) -> Shape:
    """The split of all ranks, as NeoX computes it (arguments.py:905-935: pp and mp below 1 count as
    1)."""
    for name in ("pipe_parallel_size", "model_parallel_size"):
        number = draft.number(name)
        if number is not None and number < 0:
            draft.error(f"`{name}: {number}` is negative", name)
            draft.values.pop(name)
    tensor = max(draft.number("model_parallel_size") or 1, 1)
    pipeline = max(draft.number("pipe_parallel_size") or 0, 0)
    world, stages = nodes * ranks_per_node, max(pipeline, 1)
    rest = world % (tensor * stages)
    shape = Shape(
        nodes, ranks_per_node, tensor, pipeline, None if rest else world // (tensor * stages)
    )
    if rest:
        at_least = tensor * stages // math.gcd(tensor * stages, ranks_per_node)
        draft.error(
            f"{world} ranks cannot be split into tensor parallelism {tensor} x pipeline parallelism"
            f" {stages}",
            where=where_nodes,
            why=(
                f"{shape.formula} = {world / tensor / stages:g}, which must be whole"
                f" (`model_parallel_size` at {draft.where('model_parallel_size')},"
                f" `pipe_parallel_size` at {draft.where('pipe_parallel_size')})"
            ),
            hint=f"a multiple of {at_least} nodes",
        )
    draft.check(
        Rule(
            tensor > ranks_per_node or ranks_per_node % tensor,
            f"`model_parallel_size: {tensor}` does not stay within a node of {ranks_per_node} GPUs",
            "model_parallel_size",
            why="tensor parallelism exchanges activations in every layer, and between nodes that is"
            " many times slower",
            hint=f"a divisor of {ranks_per_node}; for more, use `pipe_parallel_size`",
            level="warning",
        )
    )
    if shape.data:
        draft.decisions["data_parallel_size"] = Decision(
            "data_parallel_size", shape.data, shape.formula, where_nodes
        )
    draft.own(
        "global_num_gpus",
        world,
        f"{nodes} nodes x {ranks_per_node} ranks, so that NeoX asks neither torch nor a hostfile",
        hint="set `nodes:` instead",
    )
    return shape


def decide_batch(draft: Draft, shape: Shape, where_nodes: str) -> None:
    """Fill in what is missing of the three batch numbers and refuse a contradiction, saying what
    would fit.

    NeoX takes a missing accumulation for 1 instead of deriving it (deepspeed_args.py:49), so it is
    derived here, and all three are written out. It asserts the identity at start-up
    (arguments.py:866-883).
    """
    for name in (_TRAIN, _MICRO, _STEPS):
        number = draft.number(name)
        if draft.given(name) and number is not None and number < 1:
            draft.error(f"`{name}: {number}` must be at least 1", name)
            return
    if draft.broken & {_TRAIN, _MICRO, _STEPS} or not shape.data:
        return
    train, micro = draft.values.get(_TRAIN), draft.values.get(_MICRO)
    steps = draft.values.get(_STEPS)
    data = shape.data
    if train is None and micro is None:
        draft.error(
            f"neither `{_MICRO}` nor `{_TRAIN}` is given",
            _TRAIN,
            why=f"{IDENTITY}, which is {data}",
            hint=f"set `config: {{{_MICRO}: …}}`",
        )
        return
    if steps is None and train is not None and micro is not None:
        if train % (micro * data):
            _refuse(draft, shape, train, micro, None, where_nodes)
            return
        steps = train // (micro * data)
        reason = f"{_TRAIN} {train} / ({micro} x {data}); NeoX would take 1 when it is left out"
        draft.put(
            _STEPS, steps, reason if steps > 1 else f"{_TRAIN} {train} = {micro} x 1 x {data}"
        )
    elif steps is None:
        steps = 1
        draft.put(_STEPS, 1, "nothing says otherwise, so one micro batch a step")
    if micro is None:
        assert train is not None
        if train % (steps * data):
            _refuse(draft, shape, train, None, steps, where_nodes)
            return
        micro = train // (steps * data)
        draft.put(_MICRO, micro, f"{_TRAIN} {train} / ({steps} x {data})")
    if train is None:
        train = micro * steps * data
        draft.put(_TRAIN, train, f"{micro} x {steps} x {data}: {IDENTITY}")
    if train != micro * steps * data:
        _refuse(draft, shape, train, micro, steps, where_nodes)


def _refuse(
    draft: Draft, shape: Shape, train: int, micro: int | None, steps: int | None, where_nodes: str
) -> None:
    data = shape.data
    assert data
    product = f"{micro or '?'} x {steps or '?'} x {data}"
    equals = f" = {micro * steps * data}" if micro and steps else ""
    # Blame the number that the run itself set, else the batch size.
    blamed = next(
        (
            name
            for name in (_TRAIN, _MICRO, _STEPS)
            if draft.layer(name) == RUN and draft.given(name)
        ),
        _TRAIN,
    )
    lines = [IDENTITY, f"data-parallel size: {shape.formula} = {data}"]
    for name, value in ((_TRAIN, train), (_MICRO, micro), (_STEPS, steps)):
        lines.append(f"{name}: {value} at {draft.where(name)}" if value else f"{name}: not given")
    if micro and not steps:
        what = f"`{_TRAIN}: {train}` is no multiple of {micro} x {data} = {micro * data}"
    elif steps and not micro:
        what = f"`{_TRAIN}: {train}` is no multiple of {steps} x {data} = {steps * data}"
    else:
        what = f"the batch contradicts the ranks: {train} is not {product}{equals}"
    fits = _what_fits(shape, train, micro, steps)
    draft.error(
        what, blamed, why="\n".join(lines), hint="one of: " + "; ".join(fits) if fits else ""
    )


def _what_fits(shape: Shape, train: int, micro: int | None, steps: int | None) -> list[str]:
    """Every single change that satisfies the identity."""
    data = shape.data
    assert data
    fits = []
    micro_or_1, steps_or_1 = micro or 1, steps or 1
    whole = micro_or_1 * steps_or_1 * data
    if train % whole or train == whole or (micro and steps):
        fits.append(
            f"`{_TRAIN}: {whole}`"
            if micro
            else f"`{_TRAIN}: {max(round(train / whole), 1) * whole}`"
        )
    if micro and steps and train % (micro * data) == 0:
        fits.append(f"`{_STEPS}: {train // (micro * data)}`")
    if train % (steps_or_1 * data) == 0:
        fits.append(f"`{_MICRO}: {train // (steps_or_1 * data)}`")
    if train % (micro_or_1 * steps_or_1) == 0:
        ranks = train // (micro_or_1 * steps_or_1) * shape.tensor * shape.stages
        if ranks % shape.ranks_per_node == 0:
            fits.append(f"`nodes: {ranks // shape.ranks_per_node}`")
    if len(fits) == 1 and micro:
        near = [m for m in _divisors(train // data) if m != micro] if train % data == 0 else []
        fits += (
            [f"`{_MICRO}: {near[0]}` with `{_STEPS}: {train // data // near[0]}`"] if near else []
        )
    return fits


def _divisors(number: int) -> list[int]:
    """Divisors, the greatest first; small numbers only."""
    return [n for n in range(min(number, 64), 0, -1) if number % n == 0]
