"""Who starts a program's processes on every node: each launcher's command line as it wants it on
several Slurm nodes. Pure.

One launcher a node. What only the node's task knows (its number), and what only the job knows (the
rendezvous, new for every start), is shell text that the task fills in. None restarts anything
inside a link: a link that begins anew does that, from the newest complete checkpoint.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpctrain.base.paths import shipped_text
from hpctrain.base.shell import ShellText, variable

NODE, ADDRESS, PORT = map(variable, ("SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT"))
ACCELERATE_FILE, RAY_FILE = "accelerate.yml", "ray_node.py"
# accelerate/commands/launch.py: its own `static` rendezvous, which asks for both on every node.
ACCELERATE_ON_NODE = tuple(
    ShellText(f"--{option} {word}")
    for option, word in (
        ("machine_rank", NODE),
        ("main_process_ip", ADDRESS),
        ("main_process_port", PORT),
    )
)
# torch/distributed/run.py, the static rendezvous: ranks are in the order of Slurm's nodes, which
# c10d's are not, and the first node's agent listens at the address.
_TORCHRUN_ON_NODE = (
    ShellText(f"--node-rank {NODE}"),
    ShellText(f"--master-addr {ADDRESS}"),
    ShellText(f"--master-port {PORT}"),
    ShellText('--rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'),
)
# deepspeed/launcher/launch.py, which `deepspeed` itself starts on each node over pdsh.
_DEEPSPEED_ON_NODE = (
    ShellText(f"--node_rank {NODE}"),
    ShellText(f"--master_addr {ADDRESS}"),
    ShellText(f"--master_port {PORT}"),
)


@dataclass(frozen=True)
class Nodes:
    """What a launcher must know of the job: nodes, processes and GPUs a node, where nodes may
    write, and the run directory."""

    count: int
    processes: int
    gpus: int
    tmp_path: str
    run_dir: str


@dataclass(frozen=True)
class Launch:
    """A launcher's words: `argv` for all nodes, `on_node` filled in there, then the program's.
    `files` go into the run directory."""

    argv: tuple[str, ...]
    on_node: tuple[ShellText, ...]
    program: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def is_python(program: Sequence[str]) -> bool:
    """Whether Python runs it: `-m module`, a script, or a word that the job's shell fills in."""
    first = program[0] if program else ""
    return first == "-m" or first.endswith(".py") or "$" in first


def launch(
    kind: str,
    python: str,
    program: Sequence[str],
    nodes: Nodes,
    more: Sequence[str] = (),
    config: str | None = None,
) -> Launch:
    """The words of the launcher `kind` for `program`. `more`: options of the user's for it;
    `config`: a config file of accelerate's."""
    words, by_python = tuple(program), is_python(program)
    argv: tuple[str, ...]
    if kind == "srun":  # of a word that the shell fills in, nobody knows what it will be
        return Launch((python, "-u") if by_python and "$" not in words[0] else (), (), words)
    if kind == "ray":
        argv = (python, "-u", os.path.join(nodes.run_dir, RAY_FILE), "--gpus", str(nodes.gpus))
        argv += (*more, "--tmp", nodes.tmp_path, "--", *((python, "-u") if by_python else ()))
        return Launch(argv, (), words, {RAY_FILE: shipped_text("base", RAY_FILE)})
    if kind == "torchrun":
        argv = (python, "-u", "-m", "torch.distributed.run")
        argv += ("--nnodes", str(nodes.count), "--nproc-per-node", str(nodes.processes))
        argv += ("--max-restarts", "0", *more, *(() if by_python else ("--no-python",)))
        return Launch(argv, _TORCHRUN_ON_NODE, words)
    if kind == "deepspeed":
        argv = (python, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={_world(nodes)}")
        argv += (*more, *(() if by_python else ("--no_python",)))
        module = ("--module", *words[1:]) if words[:1] == ("-m",) else words
        return Launch(argv, _DEEPSPEED_ON_NODE, module)
    files = {} if config else {ACCELERATE_FILE: _accelerate_config(nodes)}
    config = config or os.path.join(nodes.run_dir, ACCELERATE_FILE)
    argv = (python, "-u", "-m", "accelerate.commands.launch", "--config_file", config)
    argv += ("--num_machines", str(nodes.count))
    argv += ("--num_processes", str(nodes.count * nodes.processes))
    if nodes.count > 1:
        # accelerate's own way for DeepSpeed on several nodes is pdsh with a host file.
        argv += ("--rdzv_backend", "static", "--deepspeed_multinode_launcher", "standard")
    argv += (*more, *(() if by_python else ("--no_python",)))
    return Launch(argv, ACCELERATE_ON_NODE, words, files)


def _world(nodes: Nodes) -> str:
    """DeepSpeed's world: the devices of every node, in Slurm's order; the names are only keys."""
    world = {f"node{index}": list(range(nodes.processes)) for index in range(nodes.count)}
    return base64.urlsafe_b64encode(json.dumps(world).encode()).decode()


def _accelerate_config(nodes: Nodes) -> str:
    """Without a file, accelerate takes what its user once answered to `accelerate config`."""
    several = nodes.count * nodes.processes > 1
    return (
        "# So that nothing is taken from ~/.cache/huggingface/accelerate/default_config.yaml.\n"
        "compute_environment: LOCAL_MACHINE\n"
        f"distributed_type: {'MULTI_GPU' if several else 'NO'}  # torchrun's way, also on CPUs\n"
        "mixed_precision: 'no'\n"
    )
