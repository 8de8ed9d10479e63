"""torch.distributed.checkpoint, from 1 to 8 ranks: what Megatron, OLMo-core, torchtitan and accelerate build on."""

from __future__ import annotations

import os
from typing import Any

from .contract import Leaves, Load, Writer, leaves

POISON = -7.0


def model(width: int = 24) -> Any:
    import torch

    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Embedding(40, width),
        torch.nn.Linear(width, 2 * width),
        torch.nn.LayerNorm(2 * width),
        torch.nn.Linear(2 * width, 40),
    )


def train_step(net: Any, optimizer: Any, step: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (8,), generator=generator)
    loss = torch.nn.functional.cross_entropy(net(ids), ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Dcp(Writer):
    """`dcp.save` of a model, its AdamW, a step and a random state into `step-N`; loaded by `dcp.load` without a group."""

    layout = "dcp"
    preload = (
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.device_mesh",
    )
    options: dict[str, Any] = {}  # of FileSystemWriter
    save_options: dict[str, Any] = {}

    def folder(self, step: int) -> str:
        return f"step-{step}"

    def wrapped(self, net: Any) -> Any:
        return net

    def make(self) -> tuple[Any, Any]:
        import torch

        net = self.wrapped(model())
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    def state(self, net: Any, optimizer: Any, step: int) -> dict[str, Any]:
        import torch
        from torch.distributed.checkpoint.state_dict import get_state_dict

        weights, optim = get_state_dict(net, optimizer)
        return {
            "model": weights,
            "optim": optim,
            "trainer": {"step": step, "note": "x" * step},
            "rng": torch.get_rng_state(),
        }

    def write(self, root: str, rank: int) -> None:
        net, optimizer = self.make()
        for step in range(1, max(self.steps) + 1):
            train_step(net, optimizer, step)
            if step in self.steps:
                self.save(self.state(net, optimizer, step), os.path.join(root, self.folder(step)))

    def save(self, state: dict[str, Any], path: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, sync_files=False, **self.options)
        dcp.save(state, storage_writer=writer, **self.save_options)

    def plain(self) -> tuple[Any, Any]:
        """The same model as one process has it, whatever the ranks that saved it."""
        import torch

        net = model()
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    def reader(self, rank: int) -> Load:
        import torch.distributed.checkpoint as dcp

        net, optimizer = self.plain()
        train_step(net, optimizer, 1)
        template = self.state(net, optimizer, 0)

        def load(root: str, name: str) -> Leaves:
            state = poisoned(template)
            reader = dcp.FileSystemReader(os.path.join(root, name))
            dcp.load(state, storage_reader=reader, no_dist=True)
            return leaves(state)

        return load


def poisoned(tree: Any) -> Any:
    """A copy of a state in which no value is one that was saved."""
    import torch

    if isinstance(tree, dict):
        return {key: poisoned(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(poisoned(value) for value in tree)
    if isinstance(tree, torch.Tensor):
        return torch.full_like(tree, 111 if tree.dtype == torch.uint8 else POISON)
    return tree


class Plain1(Dcp):
    name = "dcp-plain-1"


class Plain3(Dcp):
    name = "dcp-plain-3"
    num_ranks = 3


class Plain8(Dcp):
    """More ranks than the planner has parts for each: some write empty files."""

    name = "dcp-plain-8"
    num_ranks = 8


class Threads(Dcp):
    name = "dcp-threads-2"
    num_ranks = 2
    options = {"thread_count": 3}


class ManyFiles(Dcp):
    name = "dcp-file-per-item-2"
    num_ranks = 2
    options = {"single_file_per_rank": False}


class Ddp(Dcp):
    name = "dcp-ddp-4"
    num_ranks = 4

    def wrapped(self, net: Any) -> Any:
        import torch

        return torch.nn.parallel.DistributedDataParallel(net)


class Lora(Dcp):
    """A few small adapter tensors on eight ranks."""

    name = "dcp-lora-8"
    num_ranks = 8

    def make(self) -> tuple[Any, Any]:
        return self.plain()

    def plain(self) -> tuple[Any, Any]:
        import torch

        torch.manual_seed(3)
        net = torch.nn.Sequential(
            torch.nn.Embedding(40, 24),
            torch.nn.Linear(24, 2, bias=False),
            torch.nn.Linear(2, 40, bias=False),
        )
        net[0].weight.requires_grad_(False)
        return net, torch.optim.SGD([one for one in net.parameters() if one.requires_grad], lr=0.1)

    def state(self, net: Any, optimizer: Any, step: int) -> dict[str, Any]:
        full = super().state(net, optimizer, step)
        return {"model": {key: full["model"][key] for key in ("1.weight", "2.weight")}}


class Sharded(Dcp):
    """FSDP2: every parameter is cut over the ranks."""

    def mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (self.num_ranks,))

    def wrapped(self, net: Any) -> Any:
        from torch.distributed.fsdp import fully_shard

        mesh = self.mesh()
        for part in net:
            fully_shard(part, mesh=mesh)
        return fully_shard(net, mesh=mesh)


class Fsdp2(Sharded):
    name = "dcp-fsdp-2"
    num_ranks = 2


class Fsdp4(Sharded):
    name = "dcp-fsdp-4"
    num_ranks = 4


class Fsdp8(Sharded):
    name = "dcp-fsdp-8"
    num_ranks = 8


class Hsdp(Sharded):
    name = "dcp-hsdp-4"
    num_ranks = 4

    def mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


class Fsdp1(Dcp):
    """The older FullyShardedDataParallel, whose sharded state DCP saves as ShardedTensor or DTensor."""

    name = "dcp-fsdp1-2"
    num_ranks = 2

    def wrapped(self, net: Any) -> Any:
        import torch
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)


class Async(Sharded):
    name = "dcp-async-2"
    num_ranks = 2

    def save(self, state: dict[str, Any], path: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, sync_files=False)
        dcp.async_save(state, storage_writer=writer).result()


WRITERS = (
    Plain1,
    Plain3,
    Plain8,
    Threads,
    ManyFiles,
    Ddp,
    Lora,
    Fsdp2,
    Fsdp4,
    Fsdp8,
    Hsdp,
    Fsdp1,
    Async,
)
