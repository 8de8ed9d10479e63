"""What the tasks saw, held against the plan. Pure: records and a plan in, problems out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpctrain.base.errors import Problem
from hpctrain.base.units import compress_nodes

Task = Mapping[str, str]


@dataclass(frozen=True)
class Expected:
    """What the plan says of the step. `masks` by local rank, empty where the plan gives none."""

    num_nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    gpu_vendor: str
    masks: tuple[int, ...]
    all_gpus_visible: bool
    workdir: str
    reserved: tuple[int, ...]
    file_systems: tuple[str, ...] = ()  # the site's, each as it would be bound into a container
    exports: tuple[str, ...] = ()  # what the plan's own job script exports to every task

    @property
    def num_tasks(self) -> int:
        return self.num_nodes * self.tasks_per_node


def find_problems(tasks: Sequence[Task], expected: Expected) -> list[Problem]:
    """Everything that is wrong with one start of the step, gravest first."""
    unseen = list(_unseen(tasks, expected))
    if unseen and len(tasks) < expected.num_tasks:
        return unseen  # the first task to fail ended the others before they could tell anything
    problems = [
        *_exports(tasks, expected),
        *_ranks(tasks, expected),
        *_rendezvous(tasks),
        *_gpus(tasks, expected),
        *_masks(tasks, expected),
    ]
    return unseen + problems


def rank_of(task: Task) -> int:
    """The rank a program takes: RANK, else Slurm's own number of the task."""
    return _number(task.get("RANK", task.get("SLURM_PROCID", "")))


def local_rank_of(task: Task) -> int:
    return _number(task.get("LOCAL_RANK", task.get("SLURM_LOCALID", "")))


def bind_masks(kind: str, values: str) -> tuple[int, ...]:
    """The CPU mask of each local rank from srun's --cpu-bind: `mask_cpu:` hexadecimal masks,
    `map_cpu:` numbers of CPUs."""
    try:
        if kind.startswith("mask_cpu"):
            return tuple(int(value, 16) for value in values.split(",") if value)
        if kind.startswith("map_cpu"):
            return tuple(1 << int(value, 0) for value in values.split(",") if value)
    except ValueError:
        return ()
    return ()


def visible_gpus(task: Task, vendor: str) -> tuple[str, ...] | None:
    """The node's GPUs that the program sees, in its order; None where nothing says so.

    Slurm's own list is SLURM_STEP_GPUS. ROCR_VISIBLE_DEVICES (AMD) and CUDA_VISIBLE_DEVICES
    (NVIDIA) choose from the node's; for HIP a further HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES
    where that is not set, counts within what is left.
    """
    first = "ROCR_VISIBLE_DEVICES" if vendor == "amd" else "CUDA_VISIBLE_DEVICES"
    chosen = task.get(first, task.get("SLURM_STEP_GPUS"))
    if chosen is None:
        return None
    found = tuple(item for item in chosen.split(",") if item)
    second = (
        task.get("HIP_VISIBLE_DEVICES", task.get("CUDA_VISIBLE_DEVICES"))
        if vendor == "amd"
        else None
    )
    if second is not None:
        picks = [item for item in second.split(",") if item]
        found = tuple(
            found[int(item)] for item in picks if item.isdigit() and int(item) < len(found)
        )
    return found


def _exports(tasks: Sequence[Task], expected: Expected) -> Iterable[Problem]:
    for name in expected.exports:
        count = sum(name not in task for task in tasks)
        if count:
            yield Problem(
                f"{count} of {len(tasks)} tasks have no {name}",
                why="the planned job script exports it to every task",
                hint="is its name misspelt in the script?",
            )


def exported(script: str) -> tuple[str, ...]:
    """Those of the variables that place a task which the script exports."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    words = {
        word.partition("=")[0]
        for line in script.splitlines()
        if line.lstrip().startswith("export ")
        for word in line.split()
    }
    return tuple(name for name in names if name in words)


def _ranks(tasks: Sequence[Task], expected: Expected) -> Iterable[Problem]:
    ranks = Counter(rank_of(task) for task in tasks)
    wanted = range(expected.num_tasks)
    lost = [rank for rank in wanted if rank not in ranks]
    twice = [rank for rank, count in ranks.items() if count > 1]
    strange = [rank for rank in ranks if rank not in wanted]
    if len(tasks) != expected.num_tasks:
        yield Problem(
            f"{len(tasks)} tasks were started, and the plan has {expected.num_tasks}",
            why=f"{expected.num_nodes} nodes x {expected.tasks_per_node} tasks",
            hint="look at `--nodes`, `--ntasks-per-node` and the srun line of job.sbatch",
        )
    if lost or twice or strange:
        parts = [
            f"{word} {_some(found)}"
            for word, found in (
                ("missing:", lost),
                ("more than once:", twice),
                ("unknown:", strange),
            )
            if found
        ]
        yield Problem(
            f"not every rank is there exactly once ({'; '.join(parts)})",
            why=(
                "RANK must be read inside the task: `$SLURM_PROCID` in the batch script is 0 for"
                " every one"
            ),
            hint="export RANK in the command that srun starts",
        )
    world = sorted(
        {
            task.get("WORLD_SIZE", "")
            for task in tasks
            if task.get("WORLD_SIZE") != str(expected.num_tasks)
        }
    )
    if world:
        yield Problem(
            f"WORLD_SIZE is {_words(world)} in some tasks, and {expected.num_tasks} are planned",
            hint="WORLD_SIZE=$((SLURM_JOB_NUM_NODES * tasks a node))",
        )
    per_node: dict[str, list[int]] = {}
    for task in tasks:
        per_node.setdefault(task.get("SLURMD_NODENAME", "?"), []).append(local_rank_of(task))
    uneven = [
        node
        for node, found in per_node.items()
        if sorted(found) != list(range(expected.tasks_per_node))
    ]
    if uneven:
        node = sorted(uneven)[0]
        yield Problem(
            f"node {node} has local ranks {_some(sorted(per_node[node]))}, and 0 to"
            f" {expected.tasks_per_node - 1} are planned",
            why=(
                f"so it is on {len(uneven)} of {len(per_node)} nodes:"
                f" {compress_nodes(sorted(uneven)[:50])}"
            ),
            hint="LOCAL_RANK must be `$SLURM_LOCALID`, read inside the task",
        )


def _rendezvous(tasks: Sequence[Task]) -> Iterable[Problem]:
    found = {(task.get("MASTER_ADDR", ""), task.get("MASTER_PORT", "")) for task in tasks}
    if len(found) != 1 and tasks:
        shown = [f"{address or '(none)'}:{port or '(none)'}" for address, port in sorted(found)]
        yield Problem(
            f"the ranks have {len(found)} rendezvous addresses: {_words(shown)}",
            why="they would wait for each other until the timeout",
            hint="set MASTER_ADDR and MASTER_PORT once, in the batch script",
        )
        return
    first = next((task for task in tasks if rank_of(task) == 0), None)
    address = next(iter(found))[0] if found else ""
    if first is not None and address and not _same_host(address, first.get("SLURMD_NODENAME", "")):
        yield Problem(
            f"MASTER_ADDR is {address}, and rank 0 runs on {first.get('SLURMD_NODENAME', '?')}",
            why="rank 0 listens there; the others would wait until the timeout",
        )
    if tasks and not address:
        yield Problem(
            "the tasks have no MASTER_ADDR", hint="export MASTER_ADDR in the batch script"
        )


def _gpus(tasks: Sequence[Task], expected: Expected) -> Iterable[Problem]:
    if not expected.gpus_per_node:
        return
    users: dict[tuple[str, str], list[int]] = {}
    blind, partial = [], []
    for task in tasks:
        seen = visible_gpus(task, expected.gpu_vendor)
        local, node = local_rank_of(task), task.get("SLURMD_NODENAME", "?")
        if not seen:
            blind.append(rank_of(task))
            continue
        if expected.all_gpus_visible and len(seen) != expected.gpus_per_node:
            partial.append((rank_of(task), len(seen)))
        # A program takes the one GPU it sees, else the one of its local rank.
        gpu = seen[0] if len(seen) == 1 else seen[local % len(seen)]
        users.setdefault((node, gpu), []).append(rank_of(task))
    if blind:
        yield Problem(
            f"{len(blind)} ranks see no GPU (rank {_some(sorted(blind))})",
            hint=f"ask for them: `--gpus-per-node={expected.gpus_per_node}`",
        )
    if expected.tasks_per_node <= expected.gpus_per_node:
        shared = {key: ranks for key, ranks in users.items() if len(ranks) > 1}
        if shared:
            (node, gpu), ranks = min(shared.items())
            yield Problem(
                f"ranks {_some(sorted(ranks))} share GPU {gpu} of node {node}",
                why=(
                    f"so it is with {len(shared)} GPUs; each rank takes the GPU of its local rank"
                    " among those it sees"
                ),
                hint=(
                    "let every task see all GPUs of its node: unset ROCR_VISIBLE_DEVICES,"
                    " HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES, and leave out `--gpus-per-task`"
                    " and `--gpu-bind`"
                ),
            )
    if partial:
        rank, count = min(partial)
        yield Problem(
            f"rank {rank} sees {count} of {expected.gpus_per_node} GPUs",
            why=(
                f"so do {len(partial)} ranks; NeoX asserts local_rank == rank % device_count"
                " (initialize.py:141-149)"
            ),
            hint="leave out `--gpus-per-task`, `--gpu-bind` and *_VISIBLE_DEVICES",
        )


def _masks(tasks: Sequence[Task], expected: Expected) -> Iterable[Problem]:
    wrong: dict[str, list[int]] = {}
    for task in tasks:
        masks = bind_masks(task.get("SLURM_CPU_BIND_TYPE", ""), task.get("SLURM_CPU_BIND_LIST", ""))
        local = local_rank_of(task)
        if not expected.masks and not masks:
            continue
        if not masks:
            wrong.setdefault("no CPU mask, and the plan has one for each", []).append(rank_of(task))
            continue
        mask = masks[local % len(masks)]
        held = [core for core in expected.reserved if mask >> core & 1]
        if expected.masks and 0 <= local < len(expected.masks) and mask != expected.masks[local]:
            wrong.setdefault(
                f"another CPU mask than planned ({mask:#x} at local rank {local})", []
            ).append(rank_of(task))
        elif held:
            wrong.setdefault(
                f"core {held[0]} in the mask, which the site keeps for itself", []
            ).append(rank_of(task))
        elif bin(mask).count("1") < expected.cpus_per_task:
            wrong.setdefault(f"fewer than {expected.cpus_per_task} cores in the mask", []).append(
                rank_of(task)
            )
    for what, ranks in wrong.items():
        who = "rank {} has" if len(ranks) == 1 else "ranks {} have"
        yield Problem(
            f"{who.format(_some(sorted(ranks)))} {what}",
            why=f"{len(ranks)} of {len(tasks)} ranks",
            hint="look at the `--cpu-bind` of the srun line",
        )


def _unseen(tasks: Sequence[Task], expected: Expected) -> Iterable[Problem]:
    """One problem for each file system whose files are not there."""
    lost: dict[str, dict[str, set[int]]] = {}
    for number, task in enumerate(tasks):
        for path in filter(None, task.get("unseen", "").split(":")):
            above = [
                root for root in expected.file_systems if path.startswith(root.rstrip("/") + "/")
            ]
            lost.setdefault(max(above, key=len, default=path), {}).setdefault(path, set()).add(
                number
            )
    inside = any(task.get("SINGULARITY_CONTAINER") for task in tasks)
    for root, paths in lost.items():
        count = len(set().union(*paths.values()))
        words = [f"`{path}`" for path in paths]
        more = f", … ({len(words)} in all)" if len(words) > 4 else ""
        yield Problem(
            f"{', '.join(words[:4])}{more} {'is' if len(words) == 1 else 'are'} not there for"
            f" {count} of {len(tasks)} tasks",
            why=f"the container does not bind {root}" if inside else "no such path on the nodes",
            hint=f"bind it: `container_binds: [{root}]`" if inside else "is the path right?",
        )


def _same_host(address: str, node: str) -> bool:
    return address == node or address.split(".")[0] == node or address.startswith(node)


def _number(text: str) -> int:
    return int(text) if text.lstrip("-").isdigit() else -1


def _some(found: Sequence[int]) -> str:
    shown = ", ".join(map(str, found[:8]))
    return shown + (f", … ({len(found)} in all)" if len(found) > 8 else "")


def _words(found: Sequence[str]) -> str:
    return ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
