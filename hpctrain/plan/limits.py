"""Whether a run fits: the partition's limits, the checkpoint folder, the bill, and how often it
must save. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpctrain.base.units import format_duration, format_time
from hpctrain.config import billing
from hpctrain.config.site import NodeType, Partition
from hpctrain.plan.notes import Notes
from hpctrain.plan.shape import fitting_partitions, limit_line
from hpctrain.recipes.contract import Resolved


def check_checkpoint(notes: Notes) -> None:
    spec = notes.spec
    if spec.has_start and not spec.checkpoint_dir:
        notes.error(
            "`checkpoint.start` without `checkpoint.dir`: there is no folder to save to",
            "checkpoint",
            hint="set `checkpoint: {start: …, dir: …}`",
        )
    if spec.checkpoint_dir:
        notes.decide("checkpoint.dir", spec.checkpoint_dir, "as the run says", "checkpoint", "dir")
        if spec.checkpoint_start:
            why = f"stage `{spec.handed.stage}` hands it over" if spec.handed else "as the run says"
            notes.decide("checkpoint.start", spec.checkpoint_start, why, "checkpoint", "start")
            if (spec.checkpoint_start + "/").startswith(spec.checkpoint_dir + "/"):
                notes.error(
                    "`checkpoint.start` lies inside `checkpoint.dir`",
                    "checkpoint",
                    "start",
                    why=(
                        "the new run would save beside the checkpoint it starts from, and could"
                        " overwrite it"
                    ),
                    hint="give the run a new, empty `checkpoint.dir`",
                )
        if spec.checkpoint_dir == spec.base_dir:
            notes.error(
                "`checkpoint.dir` is the folder of run.yaml itself",
                "checkpoint",
                "dir",
                hint="name a folder of its own",
            )


def check_storage(notes: Notes, node: NodeType) -> None:
    """Whether checkpoints and data lie where the site wants them: not on small file systems, not on
    one node's own disk."""
    spec = notes.spec
    if spec.checkpoint_dir:
        _check_place(notes, node, "checkpoints", spec.checkpoint_dir, "error", "checkpoint", "dir")
    for kind, paths in spec.data.items():
        for index, path in enumerate(paths):
            _check_place(notes, node, "data", path, "warning", "data", kind, index)


def _check_place(
    notes: Notes, node: NodeType, what: str, path: str, level: str, *where: Any
) -> None:
    site, account = notes.site, notes.spec.account or ""

    def under(folder: str) -> bool:
        # Up to the first part that differs per user or project: every project's folder is of the
        # same kind.
        fixed = folder.split("{")[0].rstrip("/")
        return bool(fixed) and (path == fixed or path.startswith(fixed + "/"))

    storage = site.values["storage"]
    good = [
        fields["path"].replace("{account}", account or "…")  # noqa: RUF027
        for fields in storage.values()
        if what in fields["holds"]
    ]
    for name, fields in storage.items():
        if under(fields["path"]) and what not in fields["holds"] and good:
            quota = (
                f" ({fields['quota_gib']:g} GiB, {fields['max_files']:,} files)"
                if fields["quota_gib"] and fields["max_files"]
                else ""
            )
            notes.error(
                f"{what} do not belong on `{name}`: `{path}`",
                *where,
                level=level,
                why=(
                    f"{fields['path']} is small{quota}, set in"
                    f" {site.document.where('storage', name)}"
                ),
                hint=f"use {' or '.join(good)}",
            )
    if storage and under(node.tmp_path):
        notes.error(
            f"`{path}` lies on each node's own {node.tmp_path}, which is gone when the job ends",
            *where,
            level="warning",
            why=f"set in {site.document.where('node_types', node.name, 'tmp')}",
            hint=f"use {' or '.join(good)}" if good else "",
        )


def check_limits(notes: Notes, partition: Partition) -> None:
    spec, site = notes.spec, notes.site
    fitting = [p.name for p in fitting_partitions(notes, like=partition)]
    others = f"partitions that fit: {', '.join(fitting)}" if fitting else ""

    def over(what: str, limit: str, key: str, field: str, hint: str) -> None:
        notes.error(
            f"{what} than partition `{partition.name}` allows ({limit})",
            key,
            why=f"limit set in {site.document.where('partitions', partition.name, field)}",
            hint="; ".join(filter(None, [hint, others])),
        )

    limit_s = partition.time_limit_s(spec.num_nodes)
    if limit_s and spec.time_s > limit_s:
        links = -(-spec.time_s // limit_s)
        over(
            f"`time: {spec.document.get('time', default=format_time(spec.time_s))}` is longer",
            format_time(limit_s),
            "time",
            "max_time_by_nodes" if partition.max_time_by_nodes else "max_time",
            f"set `time: {format_time(limit_s)}` and `chain: {{jobs: {links}}}`",
        )
    if partition.max_nodes and spec.num_nodes > partition.max_nodes:
        over(
            f"`nodes: {spec.num_nodes}` is more", str(partition.max_nodes), "nodes", "max_nodes", ""
        )
    if partition.min_nodes and spec.num_nodes < partition.min_nodes:
        over(
            f"`nodes: {spec.num_nodes}` is less",
            f"at least {partition.min_nodes}",
            "nodes",
            "min_nodes",
            "",
        )
    if partition.max_submitted and spec.num_links > partition.max_submitted:
        over(
            f"a chain of {spec.num_links} jobs is more",
            f"{partition.max_submitted} submitted jobs a user",
            "chain",
            "max_submitted",
            f"queue at most {partition.max_submitted}, then `hpctrain chain --extend`",
        )
    if partition.debug:
        notes.error(
            f"partition `{partition.name}` is for short tests",
            "partition",
            level="note",
            why=f"{limit_line(notes, partition)}",
        )


def decide_cost(
    notes: Notes,
    partition: Partition,
    node: NodeType,
    gpus: int,
    cores: int,
    memory_gib: float,
    whole: bool,
) -> billing.Cost:
    if whole:
        cores, memory_gib, gpus = node.usable_cores, node.memory_gib, node.gpus
    result = billing.cost(
        partition, notes.spec.num_nodes, cores, memory_gib, gpus, notes.spec.time_s
    )
    if result.billed is not None:
        notes.decide(
            "cost.job",
            f"{result.billed:,.1f} {result.unit}s",
            result.formula,
            "partitions",
            partition.name,
            "billing",
            site=True,
        )
        if notes.spec.num_links > 1:
            total = result.billed * notes.spec.num_links
            notes.decide(
                "cost.chain",
                f"{total:,.1f} {result.unit}s",
                f"at most, for {notes.spec.num_links} jobs",
                "chain",
                "jobs",
            )
    return result


def check_cadence(notes: Notes, resolved: Resolved, signal: Mapping[str, Any], gpus: int) -> None:
    spec, cadence = notes.spec, resolved.cadence
    if not spec.step_time_s or not cadence.iterations:
        return
    saves = cadence.saves_on_signal and signal["forward"]
    work_s = cadence.iterations * spec.step_time_s
    if not any(one.name == "estimate.training_time" for one in resolved.decisions):
        gpu_hours = work_s / 3600 * spec.num_nodes * gpus
        notes.decide(
            "estimate.training_time",
            format_duration(work_s),
            f"{cadence.iterations:,} iterations x {spec.step_time_s:g} s"
            + (f"; {gpu_hours:,.0f} GPU-hours" if gpus else ""),
            "estimate",
            "step_time_s",
        )
    if (
        cadence.save_every
        and not saves
        and cadence.save_every * spec.step_time_s > spec.time_s
        and work_s > spec.time_s
    ):
        notes.error(
            f"a checkpoint every {cadence.save_every} iterations of {spec.step_time_s:g} s never"
            f" comes within `time: {format_time(spec.time_s)}`",
            "time",
            why=(
                "the first would be saved after"
                f" {format_time(int(cadence.save_every * spec.step_time_s))}, so no link makes"
                " progress"
            ),
            hint=f"save every {max(int(spec.time_s / spec.step_time_s / 4), 1)} iterations or so",
        )
        return
    links = billing.links_needed(
        cadence.iterations,
        spec.step_time_s,
        cadence.save_every,
        spec.time_s,
        signal["lead_s"] if saves else 0,
        saves,
    )
    if links:
        notes.decide(
            "chain.links_needed",
            links,
            f"{cadence.iterations} iterations x {spec.step_time_s:g} s",
            "estimate",
            "step_time_s",
        )
        if links > spec.num_links:
            notes.error(
                f"{links} links are needed, and `chain.jobs` queues {spec.num_links}",
                "chain",
                level="note",
                hint=f"`hpctrain chain --jobs {links}`",
            )
    if cadence.save_every:
        lost = cadence.save_every * spec.step_time_s
        notes.decide(
            "chain.lost_work",
            format_time(max(int(lost), 1)),
            "most work lost when a node fails: one checkpoint interval",
        )
        mttf = billing.mean_time_to_failure_s(spec.num_nodes)
        best = billing.young_daly_s(spec.save_time_s or 120, mttf)
        notes.decide(
            "checkpoint.best_interval",
            format_time(int(best)),
            f"Young-Daly: sqrt(2 x {spec.save_time_s or 120:g} s save x {mttf / 3600:.0f} h between"
            " failures)",
        )
