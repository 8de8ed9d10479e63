"""Time and cost of a run from what its owner states, and which of the statements cannot both hold.
Pure."""

from __future__ import annotations

from hpctrain.base.errors import Problem
from hpctrain.base.units import format_duration, format_time
from hpctrain.config import billing as arithmetic
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document
from hpctrain.config.trainers.trl import HfSftConfig
from hpctrain.recipes.contract import Context

# Two figures for one quantity are taken for the same within a quarter: a first measurement is no
# better than that.
TOLERANCE = 1.25


def estimate(
    config: HfSftConfig, context: Context, document: Document
) -> tuple[list[Decision], list[Problem]]:
    """Decisions `estimate.*`, and a problem for each pair of stated figures that contradict.

    Stated may be: rows an hour of the whole run (`samples_per_hour`), seconds a step
    (`estimate.step_time_s`), how long all of it takes (`expected_time`), the price of a GPU-hour,
    and what all of it costs (`expected_cost`).
    """
    spec, options = context.spec, context.options
    batch = config.train_batch_size(context.world_size)
    rows = _rows(config, batch)
    rate, problems = _rate(context, batch)
    stated_s = options["expected_time"]
    decisions: list[Decision] = []
    hours = stated_s / 3600 if stated_s else None
    where_rate = (
        spec.where("recipe_options", "samples_per_hour")
        if options["samples_per_hour"]
        else spec.where("estimate", "step_time_s")
    )
    where_time = spec.where("recipe_options", "expected_time")
    if rows and rate:
        hours = rows / rate
        # A job starts by loading; the figure is the training alone.
        decisions.append(
            Decision(
                "estimate.training_time",
                _hours(hours),
                f"{_work(config, rows)} at {rate:,.0f} an hour",
                where_rate,
            )
        )
        if stated_s and not _same(stated_s, hours * 3600):
            problems.append(
                Problem(
                    f"{rate:,.0f} rows an hour and {_hours(stated_s / 3600)} for the whole run"
                    " cannot both hold",
                    where=where_time,
                    why=(
                        f"{_work(config, rows)} take {_hours(hours)} at that rate ({where_rate});"
                        f" {_hours(stated_s / 3600)} would need {rows / stated_s * 3600:,.0f} an"
                        " hour"
                    ),
                    hint=(
                        "measure one of them, for example with `hpctrain ladder`, and correct the"
                        " other"
                    ),
                )
            )
        elif hours * 3600 > spec.time_s * spec.num_links:
            links = arithmetic.links_needed(
                config.max_steps or 1,
                hours * 3600 / (config.max_steps or 1),
                config.save_steps,
                spec.time_s,
                min(180, spec.time_s // 4),
                True,
            )
            problems.append(
                Problem(
                    f"{_hours(hours)} of training do not fit into {spec.num_links} x"
                    f" {format_time(spec.time_s)}",
                    where=spec.where("chain") if spec.num_links > 1 else spec.where("time"),
                    level="warning",
                    hint=f"`chain: {{jobs: {links}}}`" if links else "",
                )
            )
    elif rate and stated_s and not rows:
        problems.append(
            Problem(
                "how long the run takes cannot be told without the number of rows",
                where=where_time,
                level="note",
                hint="give `config.dataset_rows` or `config.max_steps`",
            )
        )
    if rate:
        between = config.save_steps * batch / rate
        formula = f"{config.save_steps:,} steps of {batch} rows at {rate:,.0f} an hour"
        decisions.append(
            Decision(
                "checkpoint.interval",
                _hours(between),
                f"{formula}: at most so much is lost in a crash",
                document.where("save_steps"),
            )
        )
        if (
            between * 3600 > spec.time_s
            and (config.max_steps or config.save_steps) >= config.save_steps
        ):
            problems.append(
                Problem(
                    f"no checkpoint comes within `time: {format_time(spec.time_s)}` but the one on"
                    " the signal",
                    where=document.where("save_steps"),
                    why=f"{formula} take {_hours(between)}",
                    level="warning",
                    hint=(
                        f"`save_steps: {max(int(spec.time_s / 3600 * rate / batch / 4), 1)}` or so"
                    ),
                )
            )
    price = options["gpu_hour_price"]
    if hours and price:
        gpus = max(spec.num_nodes * context.gpus_per_node, 1)
        cost = hours * gpus * price
        formula = f"{hours:,.1f} h x {gpus} GPUs x {price:g} a GPU-hour"
        decisions.append(
            Decision(
                "estimate.cost",
                f"{cost:,.2f}",
                formula,
                spec.where("recipe_options", "gpu_hour_price"),
            )
        )
        stated = options["expected_cost"]
        if stated and not _same(stated, cost):
            problems.append(
                Problem(
                    f"a cost of {stated:g} and {price:g} a GPU-hour cannot both hold",
                    where=spec.where("recipe_options", "expected_cost"),
                    why=f"{formula} = {cost:,.2f}",
                    hint="correct one of them",
                )
            )
    return decisions, problems


def _rows(config: HfSftConfig, batch: int) -> float | None:
    """Rows that are trained on in all, None where unknown."""
    if config.dataset_rows and config.max_steps is None:
        return float(config.dataset_rows * config.num_train_epochs)
    return float(config.max_steps * batch) if config.max_steps else None


def _work(config: HfSftConfig, rows: float) -> str:
    if config.dataset_rows:
        return f"{config.dataset_rows:,} rows x {rows / config.dataset_rows:.3g} epochs"
    return f"{rows:,.0f} rows"


def _rate(context: Context, batch: int) -> tuple[float | None, list[Problem]]:
    """Rows an hour of the whole run as stated, and whether it is stated twice and differently."""
    spec, stated = context.spec, context.options["samples_per_hour"]
    measured = batch / spec.step_time_s * 3600 if spec.step_time_s else None
    if stated and measured and not _same(stated, measured):
        return stated, [
            Problem(
                f"`samples_per_hour: {stated:g}` and `step_time_s: {spec.step_time_s:g}` cannot"
                " both hold",
                where=spec.where("recipe_options", "samples_per_hour"),
                why=(
                    f"a step has {batch} rows, which is {measured:,.0f} an hour at"
                    f" {spec.where('estimate', 'step_time_s')}"
                ),
                hint="delete the one that was not measured",
            )
        ]
    return stated or measured, []


def _hours(hours: float) -> str:
    """As people state it: `12 h`, `208 h`; short ones in minutes."""
    if hours < 1:
        return format_duration(hours * 3600)
    return f"{hours:,.3g} h" if hours < 100 else f"{hours:,.0f} h"


def _same(one: float, other: float) -> bool:
    return max(one, other) <= TOLERANCE * min(one, other)
