"""DeepSpeed's engine: ZeRO 0 to 3, bf16, tags of one's own, pipeline stages, experts, universal
checkpoints."""

from __future__ import annotations

import os
from typing import Any

from .contract import COMMON_MODULES, Leaves, Load, Writer, leaves, without_gaps
from .dcp import POISON

ENGINE_MODULES = (
    *COMMON_MODULES,
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


def without_shared_memory() -> None:
    """DeepSpeed would compile a shared-memory all-reduce with g++; gloo needs nothing built. To ask
    what could be built at all runs the compiler four times."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine(Writer):
    """`engine.save_checkpoint` into `global_stepN`, named by `latest`; loaded by
    `engine.load_checkpoint(tag=…)`."""

    layout = "deepspeed"
    tracker = "latest"
    reloads = False
    preload = ENGINE_MODULES
    stage = 0
    more: dict[str, Any] = {}

    def get_ready(self) -> None:
        super().get_ready()
        without_shared_memory()

    def folder(self, step: int) -> str:
        return f"global_step{step}"

    def net(self) -> Any:
        from .dcp import model

        return model(8)

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "zero_optimization": {"stage": self.stage},
            **self.more,
        }

    def engine(self) -> Any:
        import deepspeed
        import torch

        if not torch.distributed.is_initialized():
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        return self.initialize()

    def initialize(self) -> Any:
        import deepspeed

        net = self.net()
        parameters = [one for one in net.parameters() if one.requires_grad]
        return deepspeed.initialize(model=net, model_parameters=parameters, config=self.config())[0]

    def train(self, engine: Any, step: int) -> None:
        import torch

        ids = torch.randint(0, 40, (2,), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(engine(ids).float(), ids)
        engine.backward(loss)
        engine.step()

    def write(self, root: str, rank: int) -> None:
        engine = self.engine()
        for step in range(1, max(self.steps) + 1):
            self.train(engine, step)
            if step in self.steps:
                self.save(engine, root, step)

    def save(self, engine: Any, root: str, step: int) -> None:
        engine.save_checkpoint(root, tag=self.folder(step), client_state={"told": step * 11})

    def reader(self, rank: int) -> Load:
        engine = self.engine()
        self.train(engine, 77)

        def load(root: str, name: str) -> Leaves:
            poison(engine)
            path, client_state = engine.load_checkpoint(root, tag=name)
            if path is None:
                raise FileNotFoundError("load_checkpoint returned no path")
            return self.restored(engine, client_state)

        return load

    def restored(self, engine: Any, client_state: Any) -> Leaves:
        kept = {"told": client_state.get("told"), "step": engine.global_steps}
        kept["scheduler"] = engine.lr_scheduler.state_dict() if engine.lr_scheduler else None
        kept["optimizer"] = optimizer_state(engine)
        kept["model"] = model_state(engine)
        return leaves(kept)


def poison(engine: Any) -> None:
    """Nothing in the engine is as any checkpoint has it, so that what a load leaves out is seen."""
    import torch

    with torch.no_grad():
        for one in engine.module.parameters():
            getattr(one, "ds_tensor", one).fill_(POISON)
        for group in inner_optimizer(engine).param_groups:
            for one in group["params"]:
                one.fill_(POISON)
        for state in inner_optimizer(engine).state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.fill_(POISON)
    engine.global_steps = -1
    if engine.lr_scheduler:
        engine.lr_scheduler.load_state_dict({"last_batch_iteration": 99})


def inner_optimizer(engine: Any) -> Any:
    found = engine.optimizer
    while hasattr(found, "optimizer"):
        found = found.optimizer
    return found


def optimizer_state(engine: Any) -> Any:
    inner = inner_optimizer(engine)
    state = {f"{index}": dict(one) for index, one in enumerate(inner.state.values())}
    masters = [list(group["params"]) for group in inner.param_groups]
    return {"state": state, "masters": masters}


def model_state(engine: Any) -> Any:
    return {name: getattr(one, "ds_tensor", one) for name, one in engine.module.named_parameters()}


class Zero0(Engine):
    name = "deepspeed-zero0-1"


class Zero0Ranks(Engine):
    name = "deepspeed-zero0-2"
    num_ranks = num_readers = 2


class Zero1(Engine):
    name = "deepspeed-zero1-4"
    num_ranks = num_readers = 4
    stage = 1


class Zero2(Engine):
    name = "deepspeed-zero2-2"
    num_ranks = num_readers = 2
    stage = 2


class Zero3(Engine):
    name = "deepspeed-zero3-3"
    num_ranks = num_readers = 3
    stage = 3


class Bf16(Engine):
    """bf16 with ZeRO 1 and its own optimizer: files with a prefix."""

    name = "deepspeed-bf16-2"
    num_ranks = num_readers = 2
    stage = 1
    more = {"bf16": {"enabled": True}, "grad_accum_dtype": "fp32"}


class Bf16Zero0(Engine):
    name = "deepspeed-bf16-zero0-2"
    num_ranks = num_readers = 2
    more = {"bf16": {"enabled": True}}


class FreeTag(Zero1):
    """`save_checkpoint(tag="epoch3")`: any name will do, `latest` holds it."""

    name = "deepspeed-free-tag-2"
    num_ranks = num_readers = 2

    def folder(self, step: int) -> str:
        return f"epoch{step}"


class Pipeline(Engine):
    """PipelineModule with two stages and two data-parallel ranks, ZeRO 1:
    `layer_NN-model_states.pt`."""

    name = "deepspeed-pipeline-4"
    num_ranks = num_readers = 4
    stage = 1

    def net(self) -> Any:
        import torch
        from deepspeed.pipe import LayerSpec, PipelineModule

        torch.manual_seed(3)
        layers = [
            LayerSpec(torch.nn.Embedding, 40, 8),
            LayerSpec(torch.nn.Linear, 8, 16),
            torch.tanh,
            LayerSpec(torch.nn.Linear, 16, 16),
            LayerSpec(torch.nn.Linear, 16, 40),
        ]
        return PipelineModule(
            layers, num_stages=2, loss_fn=torch.nn.CrossEntropyLoss(), partition_method="uniform"
        )

    def train(self, engine: Any, step: int) -> None:
        import torch

        ids = torch.randint(0, 40, (2,), generator=torch.Generator().manual_seed(step))
        engine.train_batch(iter([(ids, ids)] * 4))


class Experts(Engine):
    """deepspeed.moe with expert parallelism over two ranks: a file for each expert, and one more
    optimizer file a rank."""

    name = "deepspeed-moe-2"
    num_ranks = num_readers = 2

    def could_be_whole(self, left: set[str]) -> bool:
        """How many ranks shared the experts is told by nothing but the names of their optimizer
        files."""
        experts = {f"layer_0_expert_{one}_mp_rank_00_model_states.pt" for one in range(4)}
        needed = {"mp_rank_00_model_states.pt", *experts}
        return left >= needed and without_gaps(left, r"expp_rank_(\d+)_mp_rank_00_optim_states\.pt")

    def net(self) -> Any:
        import torch
        from deepspeed.moe.layer import MoE

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = torch.nn.Embedding(40, 8)
                self.moe = MoE(
                    8, torch.nn.Linear(8, 8), num_experts=4, ep_size=2, k=1, min_capacity=0
                )
                self.out = torch.nn.Linear(8, 40)

            def forward(self, ids: Any) -> Any:
                return self.out(self.moe(self.embed(ids))[0])

        torch.manual_seed(3)
        return Net()

    def initialize(self) -> Any:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        net = self.net()
        groups = {"params": list(net.parameters()), "name": "all"}
        split = split_params_into_different_moe_groups_for_optimizer(groups)
        return deepspeed.initialize(model=net, model_parameters=split, config=self.config())[0]


class ExpertsZero2(Experts):
    name = "deepspeed-moe-zero2-2"
    stage = 2
    more = {"bf16": {"enabled": True}}


class Universal(Zero1):
    """The normal checkpoint with a universal one beside it, as `ds_to_universal.py` converts it."""

    name = "deepspeed-universal-beside-2"
    preload = (*ENGINE_MODULES, "deepspeed.checkpoint.ds_to_universal")
    num_ranks = num_readers = 2

    def write(self, root: str, rank: int) -> None:
        import torch

        super().write(root, rank)
        torch.distributed.barrier()
        if rank == 0:
            to_universal(root, self.folder(max(self.steps)))


def to_universal(root: str, name: str) -> None:
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    path = os.path.join(root, name)
    given = Namespace(input_folder=path, output_folder=f"{path}_universal", strict=True)
    given.num_extract_workers = given.num_merge_workers = 1
    given.inject_missing_state, given.keep_temp_folder = True, False
    ds_to_universal.main(given)


WRITERS = (
    Zero0,
    Zero0Ranks,
    Zero1,
    Zero2,
    Zero3,
    Bf16,
    Bf16Zero0,
    FreeTag,
    Pipeline,
    Experts,
    ExpertsZero2,
    Universal,
)
