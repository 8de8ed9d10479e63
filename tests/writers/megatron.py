"""megatron-core's dist_checkpointing (`--ckpt-format torch_dist`), tensor parallel over 1 and 2
ranks."""

from __future__ import annotations

import os
import shutil
from typing import Any

from .contract import COMMON_MODULES, Leaves, Load, Writer, leaves
from .ranks import FORK

TRACKER = "latest_checkpointed_iteration.txt"


class TorchDist(Writer):
    """`iter_N/` by `dist_checkpointing.save`, the tracker after a barrier, as Megatron's
    `save_checkpoint` does it."""

    layout = "megatron"
    tracker = TRACKER
    preload = (
        *COMMON_MODULES,
        "megatron.core.dist_checkpointing.strategies.checkpointable",
        "megatron.core.dist_checkpointing.strategies.torch",
        "torch.distributed.checkpoint",
    )
    reloads = False
    inside = ""  # the folder of the shards inside the checkpoint's

    def folder(self, step: int) -> str:
        return f"iter_{step:07d}"

    def state(self, step: int, rank: int) -> dict[str, Any]:
        import torch
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        def values(shape: tuple[int, ...], seed: int) -> Any:
            if step < 0:
                return torch.full(shape, -7.0)
            return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + seed))

        cut = (0, rank, self.num_ranks)
        state: dict[str, Any] = {
            "iteration": step,
            "args": {"hidden": 16, "note": "x" * max(step, 0)},
        }
        for index, kind in enumerate(("weight", "exp_avg", "exp_avg_sq")):
            local = values((12, 16), 10 * index + rank)
            state[kind] = ShardedTensor.from_rank_offsets(f"model.{kind}", local, cut)
        state["norm"] = ShardedTensor.from_rank_offsets(
            "model.norm", values((16,), 77), replica_id=rank
        )
        rng = [{"random": step, "torch": values((40,), 7)}]
        state["rng_state"] = ShardedObject("rng_state", rng, (1, self.num_ranks), (0, rank))
        return state

    def write(self, root: str, rank: int) -> None:
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        join_alone()
        filesystem_async._results_queue = FORK.Manager().Queue()  # its own would import torch anew
        for step in self.steps:
            path = os.path.join(root, self.folder(step), self.inside)
            os.makedirs(path, exist_ok=True)
            torch.distributed.barrier()
            dist_checkpointing.save(self.state(step, rank), path)
            torch.distributed.barrier()
            if rank == 0:
                self.named(root, step)

    def named(self, root: str, step: int) -> None:
        """What rank 0 does when all have written."""
        self.tell(root, step)

    def tracker_text(self, step: int) -> str:
        return str(step)

    def reader(self, rank: int) -> Load:
        from megatron.core import dist_checkpointing

        join_alone()

        def load(root: str, name: str) -> Leaves:
            path = os.path.join(root, name, self.inside)
            return leaves(dist_checkpointing.load(self.state(-1, rank), path))

        return load


def join_alone() -> None:
    """A group of one, where no other is there: dist_checkpointing needs one; and it asks CUDA to
    wait for copies."""
    import torch

    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.current_device = lambda: torch.device("cpu")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )


class TorchDist1(TorchDist):
    name = "megatron-torch-dist-1"


class TorchDist2(TorchDist):
    name = "megatron-torch-dist-2"
    num_ranks = num_readers = 2


class Bridge(TorchDist):
    """Megatron-Bridge: `train_state.pt` and last `run_config.yaml`, `latest_train_state.pt` beside.

    megatron-core writes and loads the shards. These three files are built after Bridge's
    training/checkpointing.py (1456-1500, 2813), and read as it reads them.
    """

    name = "megatron-bridge-2"
    built = "partly built"
    num_ranks = num_readers = 2

    def tell(self, root: str, step: int) -> None:
        shutil.copy(
            os.path.join(root, self.folder(step), "train_state.pt"),
            os.path.join(root, "latest_train_state.pt"),
        )
        super().tell(root, step)

    def named(self, root: str, step: int) -> None:
        import torch

        path = os.path.join(root, self.folder(step))
        torch.save({"step": torch.tensor(step)}, f"{path}/train_state.pt")
        self.tell(root, step)
        with open(f"{path}/run_config.yaml", "w") as stream:
            stream.write("model: {tensor_model_parallel_size: 2}\ncheckpoint: {save_rng: true}\n")

    def reader(self, rank: int) -> Load:
        import torch
        import yaml

        inner = super().reader(rank)

        def load(root: str, name: str) -> Leaves:
            path = os.path.join(root, name)
            with open(f"{path}/run_config.yaml") as stream:
                yaml.safe_load(stream)["model"]["tensor_model_parallel_size"]
            state = torch.load(f"{path}/train_state.pt", weights_only=True)
            return {**inner(root, name), **leaves(state, "train_state")}

        return load


class Nemo(TorchDist):
    """NeMo 2: `weights/` (torch_dist) and `context/`, of which a resume reads the first.

    megatron-core writes and loads `weights/`; the names and `context/` are built after NeMo's
    lightning/ckpt_utils.py.
    """

    name = "nemo-2"
    built = "partly built"
    layout = "nemo"
    num_ranks = num_readers = 2
    tracker = None
    inside = "weights"

    def folder(self, step: int) -> str:
        return f"model--loss=1.20-step={step}-consumed_samples={8 * step}.0"

    def named(self, root: str, step: int) -> None:
        path = os.path.join(root, self.folder(step), "context")
        os.makedirs(path)
        for name in ("io.json", "model.yaml"):
            with open(os.path.join(path, name), "w") as stream:
                stream.write("{}")


WRITERS = (TorchDist1, TorchDist2, Bridge, Nemo)
