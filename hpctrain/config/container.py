"""The command lines around a run's own program: the container's argv and srun's options. Pure
builders."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hpctrain.config.decision import Decision
from hpctrain.config.site import NodeType, Site

# What singularity and apptainer mount by themselves (their default configuration).
_MOUNTED_BY_DEFAULT = ("/tmp", "/proc", "/sys", "/dev", "/var/tmp")


def container_argv(site: Site, image: str, binds: Sequence[str]) -> list[str]:
    """The argv that runs a program inside `image`: it is appended to this list."""
    container = site.values["container"]
    argv = [container["runtime"], container["entry"]]
    if container["gpu_flag"]:
        argv.append(container["gpu_flag"])
    for bind in binds:
        argv += ["--bind", bind]
    argv.append(image)
    if container["activate"]:
        argv += ["bash", "-c", f'{container["activate"]}; exec "$@"', "activate"]
    return argv


def bind_list(
    site: Site, extra: Sequence[str], needed: Sequence[tuple[str, str]]
) -> tuple[list[str], list[Decision]]:
    """The site's binds, the run's own, and one for each needed (what, path) that none of them
    covers, with reasons."""
    binds = list(dict.fromkeys([*site.values["container"]["binds"], *extra]))
    decisions = [
        Decision(
            "container.binds",
            list(binds),
            "the site's file systems and the run's own",
            site.document.where("container", "binds"),
        )
    ]
    for what, path in needed:
        covered = [*(bind.split(":")[0] for bind in binds), *_MOUNTED_BY_DEFAULT]
        if not any(path == known or path.startswith(known.rstrip("/") + "/") for known in covered):
            binds.append(path)
            decisions.append(
                Decision("container.binds", path, f"the {what} lies outside the site's binds")
            )
    return binds, decisions


def cpu_bind(
    node: NodeType, tasks_per_node: int, cpus_per_task: int, whole_node: bool
) -> tuple[str, str] | None:
    """The site's --cpu-bind value and its reason, when it publishes one for this shape on whole
    nodes."""
    if not whole_node or not node.gpus or tasks_per_node != node.gpus:
        return None
    mask = node.cpu_bind.get(cpus_per_task)
    return (
        (mask, f"each task on the {cpus_per_task} cores next to its GPU, as the site publishes")
        if mask
        else None
    )


def parent_folder(path: str) -> str:
    """The folder that must be visible for `path` (a file, or a prefix of files) to be."""
    return os.path.dirname(path) or "/"
