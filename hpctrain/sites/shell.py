"""An interactive allocation as the site wants it: one srun, the site's modules, environment and
container around a shell.

Pure but for `read_request`; the only effect, becoming srun, is in `slurm.commands`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.shell import node_path, quote, quote_all
from hpctrain.base.units import format_mem_gib, format_time, parse_time_s
from hpctrain.config.container import bind_list, container_argv
from hpctrain.config.document import Document, merge
from hpctrain.config.fields import check, nearest
from hpctrain.config.run import FIELDS, RunSpec, read_layers, spec_from_layers, user_layers
from hpctrain.config.sbatch import option_text
from hpctrain.config.site import NodeType, Partition, Site, load_site

_DEFAULT_TIME_S = 45 * 60
# Cores of a shell on CPU nodes that are shared: enough to try things, few enough to start soon.
_FEW_CORES = 8
# Options of sbatch that `slurm.always` may hold and that srun does not know, or that make no sense
# for a shell.
_BATCH_ONLY = frozenset(
    {
        "requeue",
        "no-requeue",
        "signal",
        "begin",
        "mail-type",
        "mail-user",
        "get-user-env",
        "ignore-pbs",
    }
)


@dataclass(frozen=True)
class Wanted:
    """What the command line says; None where it says nothing. `command` is empty for a shell."""

    site: str | None = None
    account: str | None = None
    container: str | None = None
    partition: str | None = None
    num_gpus: int | None = None
    num_cpus: int | None = None
    time: str | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Allocation:
    """The srun to become, and the variables that must not be in its environment."""

    argv: tuple[str, ...]
    unset: tuple[str, ...]


def read_request(run_yaml: str | None, wanted: Wanted) -> tuple[Site, RunSpec]:
    """The site and the run's values that matter to a shell. `run_yaml` None: only the user's config
    and the options.

    Raises UsageError with every problem of the run.yaml, the profile and the options.
    """
    options = {
        key: value
        for key, value in vars(wanted).items()
        if key in ("account", "container", "partition") and value
    }
    problems = check(
        Document({key: value for key, value in options.items()}, name="command line"),
        _optional(options),
    )[1]
    if problems:
        raise UsageError(problems)
    layers = read_layers(run_yaml) if run_yaml else []
    site_name = wanted.site or merge(layers).get("site")
    if not run_yaml and not site_name:
        site_name = merge(user_layers(None)).get("site")
    if not isinstance(site_name, str):
        raise UsageError(
            "which site?",
            hint="name it with --site, or run this beside a run.yaml; see `hpctrain site list`",
        )
    base_dir = (
        os.path.dirname(os.path.abspath(run_yaml)) if run_yaml and not wanted.site else os.getcwd()
    )
    site = load_site(site_name, base_dir, "--site" if wanted.site else merge(layers).where("site"))
    if not run_yaml:
        stand_in = {"name": "shell", "site": site_name, "recipe": "command", "time": "45:00"}
        layers = [*user_layers(site_name), Document(stand_in)]
    layers.append(
        Document(
            {key: value for key, value in options.items() if key != "container"},
            name="command line",
        )
    )
    spec, found = spec_from_layers(layers, run_yaml or os.path.join(os.getcwd(), "run.yaml"))
    if any(problem.level == "error" for problem in found):
        raise UsageError(found)
    return site, spec


def allocation(site: Site, spec: RunSpec, wanted: Wanted) -> Allocation:
    """The srun of this shell. Raises UsageError with every limit that it breaks."""
    problems: list[Problem] = []
    partition = _partition(site, wanted, problems)
    node = partition.node_type
    gpus, cpus, mem_gib = _share(site, partition, wanted, problems)
    time_s = _time_s(partition, site, wanted, problems)
    account = wanted.account or spec.account
    rules = site.values["account"]
    if rules["required"] and not account:
        problems.append(
            Problem(
                f"site `{site.name}` needs an account",
                hint=f"say --account {rules['example'] or 'A'}",
            )
        )
    image = (
        os.path.abspath(os.path.expanduser(wanted.container))
        if wanted.container
        else spec.container
    )
    if image and site.values["container"]["runtime"] == "none":
        problems.append(
            Problem(
                f"site `{site.name}` runs no containers",
                where=site.document.where("container", "runtime"),
            )
        )
    if image and (":" in image or "," in image):
        problems.append(Problem(f"a container image path cannot hold `:` or `,`: `{image}`"))
    if problems:
        raise UsageError(problems)
    options = {
        "job-name": "hpctrain-shell",
        "account": account,
        "partition": partition.slurm_name,
        "qos": partition.qos,
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": cpus,
        **_gpu_option(site, node, gpus),
        "mem": format_mem_gib(mem_gib),
        "time": format_time(time_s),
        "hint": site.values["slurm"]["hint"],
        "constraint": partition.constraint or site.values["slurm"]["constraint"],
    }
    options.update(
        {
            key: value
            for key, value in site.values["slurm"]["always"].items()
            if key not in _BATCH_ONLY
        }
    )
    program = list(wanted.command) or ["bash"]
    if image:
        binds, _ = bind_list(site, spec.container_binds, [("working directory", os.getcwd())])
        program = [*container_argv(site, image, binds), *program]
    argv = ["srun", *_words(options), *([] if wanted.command else ["--pty"])]
    argv += ["bash", "-c", _setup(site, spec, node), "hpctrain-shell", *program]
    return Allocation(tuple(argv), tuple(site.values["unset_env"]))


def command_line(
    plan: Allocation, environment: Mapping[str, str], scrubbed: Mapping[str, str]
) -> str:
    """The same as one line for a terminal: what is removed from this shell's environment, then
    srun."""
    gone = sorted(
        (set(environment) - set(scrubbed)) | {name for name in plan.unset if name in environment}
    )
    prefix = ["env", *(f"--unset={name}" for name in gone)] if gone else []
    return str(quote_all([*prefix, *plan.argv]))


def _optional(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: FIELDS[key] for key in options}


def _partition(site: Site, wanted: Wanted, problems: list[Problem]) -> Partition:
    any_node = next(iter(site.node_types.values()))
    debug = next((p.name for p in site.partitions.values() if p.debug), None)
    name = wanted.partition or site.values["tools"]["debug_partition"] or debug
    if not name:
        if site.partitions:
            problems.append(
                Problem(
                    f"site `{site.name}` names no partition for tests",
                    hint=f"say --partition, one of {', '.join(site.partitions)}",
                )
            )
        return site.partition("") or Partition("", any_node)
    found = site.partition(name)
    if not found:
        problems.append(
            Problem(
                f"site `{site.name}` has no partition `{name}`", hint=nearest(name, site.partitions)
            )
        )
    return found or Partition(name, any_node)


def _share(
    site: Site, partition: Partition, wanted: Wanted, problems: list[Problem]
) -> tuple[int, int, float]:
    """(GPUs, cores, memory in GiB): one GPU and its fair share of the node unless asked for
    more."""
    node = partition.node_type
    usable_gpus = 0 if site.values["slurm"]["gpu_request"] == "none" else node.gpus
    one = usable_gpus if partition.whole_nodes else min(usable_gpus, 1)
    gpus = one if wanted.num_gpus is None else wanted.num_gpus
    if gpus > usable_gpus:
        where = site.document.where("node_types", node.name, "gpus")
        problems.append(
            Problem(
                f"--gpus {gpus} is more than a `{node.name}` node has ({usable_gpus})",
                why=f"set in {where}",
            )
        )
        gpus = usable_gpus
    if gpus and usable_gpus:
        share = max(node.usable_cores * gpus // usable_gpus, 1)
    else:
        share = node.usable_cores if partition.whole_nodes else min(node.usable_cores, _FEW_CORES)
    cpus = share if wanted.num_cpus is None else wanted.num_cpus
    if cpus > node.usable_cores:
        where = site.document.where("node_types", node.name, "usable_cores")
        problems.append(
            Problem(
                f"--cpus {cpus} is more than a `{node.name}` node gives ({node.usable_cores})",
                why=f"set in {where}",
            )
        )
    part = max(cpus / node.usable_cores, gpus / usable_gpus if usable_gpus else 0.0)
    return gpus, cpus, max(int(node.memory_gib * min(part, 1.0) * 1024), 1) / 1024


def _time_s(partition: Partition, site: Site, wanted: Wanted, problems: list[Problem]) -> int:
    limit = partition.max_time_s or 10**9
    if wanted.time is None:
        return min(_DEFAULT_TIME_S, limit)
    try:
        time_s = parse_time_s(wanted.time)
    except ValueError as error:
        problems.append(Problem(f"--time: {error}"))
        return _DEFAULT_TIME_S
    if time_s > limit:
        where = site.document.where("partitions", partition.name, "max_time")
        problems.append(
            Problem(
                f"--time {wanted.time} is longer than partition `{partition.name}` allows"
                f" ({format_time(limit)})",
                why=f"set in {where}",
            )
        )
    return time_s


def _gpu_option(site: Site, node: NodeType, gpus: int) -> dict[str, str]:
    request = site.values["slurm"]["gpu_request"]
    if not gpus or request == "none":
        return {}
    if request == "gpus-per-node":
        return {request: str(gpus)}
    kind = f"{node.gpu_type}:" if node.gpu_type else ""
    return {"gres": f"gpu:{kind}{gpus}"}


def _words(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        text = option_text(name, value)
        if text is not None and value != "":
            words.append(f"--{name}={text}" if text else f"--{name}")
    return words


def _setup(site: Site, spec: RunSpec, node: NodeType) -> str:
    """What the node runs before the shell: the job script's modules and environment. A failed line
    says so and goes on."""
    modules, values = site.values["modules"], site.values
    lines = ["module purge"] if modules["purge"] else []
    lines += [f"module use {quote(path)}" for path in modules["use"]]
    lines += [f"module load {quote(name)}" for name in modules["load"]]
    environment = {name: fields["value"] for name, fields in values["env"].items()}
    lines += [
        f"export {name}={quote(value)}" for name, value in {**environment, **spec.env}.items()
    ]
    for name, fields in values["node_dirs"].items():
        lines += [
            f"export {name}={node_path(fields['path'], node.tmp_path)}",
            f'mkdir -p "${{{name}%/*}}"; mkdir -m 0700 "${name}" 2>/dev/null ||'
            f' {{ [ -O "${name}" ] && [ ! -L "${name}" ]; }} ||'
            f' {name}=$(mktemp -d "${name}.XXXXXX")',
        ]
    return "\n".join([*lines, 'exec "$@"'])
