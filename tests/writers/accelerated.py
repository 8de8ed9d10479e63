"""accelerate's `save_state`: one process, two with FSDP2, two with DeepSpeed."""

from __future__ import annotations

import os
from typing import Any

from .contract import COMMON_MODULES, Leaves, Load, Writer, leaves, without_gaps
from .dcp import POISON, model, poisoned, train_step
from .hf import HfTrainer, fsdp_on_cpu, random_states, set_random_states
from .zero import model_state, optimizer_state, poison, without_shared_memory


class _Counter:
    """A state of the program's own, given to `register_for_checkpointing`."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Accelerated(Writer):
    """`save_state()` with automatic names: `checkpoints/checkpoint_N`; loaded by
    `load_state(path)`."""

    name = "accelerate-1"
    layout = "accelerate"
    preload = ("accelerate", *COMMON_MODULES, "torch.utils.data")
    steps = (0, 1)
    root_name = "checkpoints"

    def folder(self, step: int) -> str:
        return f"checkpoint_{step}"

    def could_be_whole(self, left: set[str]) -> bool:
        """A program may have no scheduler and register nothing of its own; nothing tells how many
        ranks it had."""
        ranks = without_gaps(left, r"random_states_(\d+)\.pkl")
        return left >= {"model.safetensors", "optimizer.bin"} and ranks

    def plugin(self) -> Any:
        return None

    def parts(self, root: str, automatic: bool = True) -> tuple[Any, Any, Any, Any, Any]:
        import torch
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        project = ProjectConfiguration(
            project_dir=os.path.dirname(root), automatic_checkpoint_naming=automatic
        )
        plugin = self.plugin()
        accelerator = Accelerator(cpu=True, project_config=project, fsdp_plugin=plugin)
        net = model(8)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
        net, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
        counter = _Counter()
        accelerator.register_for_checkpointing(counter)
        return accelerator, net, optimizer, schedule, counter

    def write(self, root: str, rank: int) -> None:
        set_random_states(5)
        accelerator, net, optimizer, schedule, counter = self.parts(root)
        for step in range(max(self.steps) + 1):
            train_step(net, optimizer, step)
            schedule.step()
            counter.value = step + 50
            accelerator.step = step + 70
            accelerator.save_state()
            set_random_states(step + 6)

    def reader(self, rank: int) -> Load:
        import torch

        accelerator, net, optimizer, schedule, counter = self.parts("/tmp/unused/checkpoints")
        train_step(net, optimizer, 3)
        untouched = schedule.state_dict()

        def load(root: str, name: str) -> Leaves:
            with torch.no_grad():
                for one in net.parameters():
                    one.fill_(POISON)
            plain = getattr(optimizer, "optimizer", optimizer)
            for one in plain.state.values():
                one.update(poisoned(dict(one)))
            schedule.load_state_dict(untouched)
            counter.value, accelerator.step = -1, -1
            set_random_states(99)
            accelerator.load_state(os.path.join(root, name))
            kept = {"model": net.state_dict(), "optimizer": plain.state_dict()["state"]}
            kept.update(scheduler=schedule.state_dict(), random=random_states())
            return leaves({**kept, "counter": counter.value, "step": accelerator.step})

        return load


class Fsdp(Accelerated):
    name = "accelerate-fsdp2-2"
    num_ranks = num_readers = 2
    preload = (
        *Accelerated.preload,
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
    )

    def could_be_whole(self, left: set[str]) -> bool:
        """As above, but the `.metadata` name the ranks."""
        folders = ("pytorch_model_fsdp_0", "optimizer_0")
        shards = {
            f"{one}/{name}"
            for one in folders
            for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
        }
        return left >= {*shards, "random_states_0.pkl", "random_states_1.pkl"}

    def plugin(self) -> Any:
        from accelerate import FullyShardedDataParallelPlugin

        fsdp_on_cpu()
        return FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="no_wrap"
        )


class Zero(Accelerated):
    """accelerate's DeepSpeed plugin: the engine's own checkpoint in `pytorch_model/`."""

    num_ranks = num_readers = 2
    reloads = False
    stage = 2
    preload = (*Accelerated.preload, *HfTrainer.preload)

    def get_ready(self) -> None:
        super().get_ready()
        without_shared_memory()

    def could_be_whole(self, left: set[str]) -> bool:
        """As above; DeepSpeed tells its ranks by itself."""
        parts = {
            f"pytorch_model/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)
        }
        if self.stage == 3:
            parts |= {one.replace("optim_states", "model_states") for one in parts}
        else:
            parts.add("pytorch_model/mp_rank_00_model_states.pt")
        return left >= {*parts, "random_states_0.pkl", "random_states_1.pkl"}

    def parts(self, root: str, automatic: bool = True) -> tuple[Any, Any, Any, Any, Any]:
        import torch
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.utils import ProjectConfiguration

        project = ProjectConfiguration(
            project_dir=os.path.dirname(root), automatic_checkpoint_naming=automatic
        )
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
        }
        accelerator = Accelerator(
            project_config=project, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)
        )
        net = model(8)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
        net, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
        counter = _Counter()
        accelerator.register_for_checkpointing(counter)
        return accelerator, net, optimizer, schedule, counter

    def train(self, accelerator: Any, net: Any, step: int) -> None:
        import torch

        ids = torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(step))
        accelerator.backward(torch.nn.functional.cross_entropy(net(ids), ids))

    def write(self, root: str, rank: int) -> None:
        set_random_states(5)
        accelerator, net, _, schedule, counter = self.parts(root)
        for step in range(max(self.steps) + 1):
            self.train(accelerator, net, step)
            schedule.step()
            counter.value, accelerator.step = step + 50, step + 70
            accelerator.save_state()
            set_random_states(step + 6)

    def reader(self, rank: int) -> Load:
        accelerator, net, _, schedule, counter = self.parts("/tmp/unused/checkpoints")
        self.train(accelerator, net, 3)

        def load(root: str, name: str) -> Leaves:
            poison(net)
            counter.value, accelerator.step = -1, -1
            set_random_states(99)
            accelerator.load_state(os.path.join(root, name))
            kept: dict[str, Any] = {"model": model_state(net), "optimizer": optimizer_state(net)}
            kept["engine's step"] = net.global_steps
            kept.update(scheduler=schedule.state_dict(), random=random_states())
            return leaves({**kept, "counter": counter.value, "step": accelerator.step})

        return load


class Zero2(Zero):
    name = "accelerate-zero2-2"


class Zero3(Zero):
    name = "accelerate-zero3-2"
    stage = 3


class OpenInstruct(Accelerated):
    """open-instruct's finetune.py: `save_state(step_N)`, then the file COMPLETED (finetune.py
    967-972, utils.py 789)."""

    name = "open-instruct-1"
    layout = "open-instruct"
    marker = "COMPLETED"
    steps = (2, 4)

    def folder(self, step: int) -> str:
        return f"step_{step}"

    def write(self, root: str, rank: int) -> None:
        set_random_states(5)
        accelerator, net, optimizer, schedule, _ = self.parts(root, automatic=False)
        for step in range(1, max(self.steps) + 1):
            train_step(net, optimizer, step)
            schedule.step()
            if step in self.steps:
                path = os.path.join(root, self.folder(step))
                accelerator.save_state(path)
                with open(os.path.join(path, "COMPLETED"), "w") as stream:
                    stream.write("COMPLETED")

    def reader(self, rank: int) -> Load:
        inner = super().reader(rank)

        def load(root: str, name: str) -> Leaves:
            if not os.path.exists(os.path.join(root, name, "COMPLETED")):
                raise FileNotFoundError("get_last_checkpoint does not take it: no COMPLETED")
            return inner(root, name)

        return load


WRITERS = (Accelerated, Fsdp, Zero2, Zero3, OpenInstruct)
