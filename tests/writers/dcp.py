"""torch.distributed.checkpoint, from 1 to 8 ranks: what Megatron, OLMo-core, torchtitan and
accelerate build on."""

from __future__ import annotations

import json
import os
from typing import Any

from .contract import COMMON_MODULES, Leaves, Load, Writer, leaves

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
    """`dcp.save` of a model, its AdamW, a step and a random state into `step-N`; loaded by
    `dcp.load` without a group."""

    layout = "dcp"
    preload = (
        *COMMON_MODULES,
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

    def storage(self, path: str) -> Any:
        import torch.distributed.checkpoint as dcp

        return dcp.FileSystemReader(path)

    def load_into(self, state: dict[str, Any], reader: Any) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(state, storage_reader=reader, no_dist=True)

    def reader(self, rank: int) -> Load:
        net, optimizer = self.plain()
        train_step(net, optimizer, 1)
        template = self.state(net, optimizer, 0)

        def load(root: str, name: str) -> Leaves:
            state = poisoned(template)
            self.load_into(state, self.storage(os.path.join(root, name)))
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
    """The older FullyShardedDataParallel, whose sharded state DCP saves as ShardedTensor or
    DTensor."""

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


class NoCollectives(Dcp):
    """`use_collectives=False`: each rank has a `.metadata` of its own, and none is there for
    all."""

    name = "dcp-no-collectives-2"
    num_ranks = num_readers = 2
    save_options = {"use_collectives": False}

    def could_be_whole(self, left: set[str]) -> bool:
        """As one rank alone would have written it."""
        return {"__0.metadata", "__0_0.distcp"} == left

    def load_into(self, state: dict[str, Any], reader: Any) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(state, storage_reader=reader)  # finds out by itself


class TorchDcp(Sharded):
    """Megatron-LM `--ckpt-format torch_dcp`: `FileSystemWriter(iter_N)` and nothing else
    (checkpointing.py 1000)."""

    name = "megatron-torch-dcp-2"
    layout = "megatron"
    num_ranks = 2
    tracker = "latest_checkpointed_iteration.txt"

    def folder(self, step: int) -> str:
        return f"iter_{step:07d}"

    def tracker_text(self, step: int) -> str:
        return str(step)

    def save(self, state: dict[str, Any], path: str) -> None:
        super().save(state, path)
        self.tell(os.path.dirname(path), state["trainer"]["step"])


class FsdpDtensor(TorchDcp):
    """`--ckpt-format fsdp_dtensor` (Megatron-FSDP): the same, loaded with `allow_partial_load`
    (checkpointing.py 2160)."""

    name = "megatron-fsdp-dtensor-2"

    def load_into(self, state: dict[str, Any], reader: Any) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)


class HfStorage(Sharded):
    """torchtitan's `last_save_in_hf`: HuggingFaceStorageWriter, one consolidated file (dcp.py
    `dcp_save`)."""

    name = "torchtitan-hf-2"
    layout = "torchtitan"
    num_ranks = 2
    mapping: dict[str, int] | None = None

    def state(self, net: Any, optimizer: Any, step: int) -> dict[str, Any]:
        return dict(super().state(net, optimizer, step)["model"])

    def save(self, state: dict[str, Any], path: str) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._consolidate_hf_safetensors import (
            consolidate_safetensors_files_on_every_rank,
        )

        sharded = os.path.join(path, "sharded") if self.mapping else path
        writer = dcp.HuggingFaceStorageWriter(
            path=sharded,
            save_distributed=True,
            fqn_to_index_mapping=self.mapping,
            enable_consolidation=not self.mapping,
        )
        dcp.save(state, storage_writer=writer)
        if self.mapping:
            consolidate_safetensors_files_on_every_rank(
                input_dir=sharded, output_dir=path, fqn_to_index_mapping=self.mapping
            )

    def reader(self, rank: int) -> Load:
        """The finished model, as whoever takes it opens it: by its index. torchtitan itself asks
        for that file alone."""
        from safetensors.torch import load_file

        def load(root: str, name: str) -> Leaves:
            path = os.path.join(root, name)
            with open(
                os.path.join(path, "model.safetensors.index.json"), encoding="utf-8"
            ) as stream:
                files = json.load(stream)["weight_map"]
            opened = {file: load_file(os.path.join(path, file)) for file in set(files.values())}
            return leaves({tensor: opened[file][tensor] for tensor, file in files.items()})

        return load


class HfStorageFiles(HfStorage):
    """The same into several files with `model.safetensors.index.json`."""

    name = "torchtitan-hf-shards-2"
    mapping = {
        "0.weight": 1,
        "1.weight": 1,
        "1.bias": 1,
        "2.weight": 2,
        "2.bias": 2,
        "3.weight": 3,
        "3.bias": 3,
    }


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
    NoCollectives,
    TorchDcp,
    FsdpDtensor,
    HfStorage,
    HfStorageFiles,
)
