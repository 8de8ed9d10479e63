"""OLMo-core's Trainer and Checkpointer with FSDP on two ranks."""

from __future__ import annotations

import os
import sys
from typing import Any

from .contract import COMMON_MODULES, Leaves, Load, Writer, leaves
from .dcp import POISON
from .hf import random_states, set_random_states


def find_olmo() -> None:
    """Its requirements contradict what else is installed, so tools/env puts it into a folder of its
    own."""
    import glob

    for path in glob.glob(os.path.join(sys.prefix, "olmo", "lib", "python*", "site-packages")):
        if path not in sys.path:
            sys.path.append(path)


class Olmo(Writer):
    """`stepN/` with `train/rankR.pt`, `model_and_optim/` (DCP) and `.metadata.json`; loaded by
    `Trainer.load_checkpoint`."""

    name = "olmo-core-2"
    layout = "olmo-core"
    slow = True
    num_ranks = num_readers = 2
    reloads = False
    preload = (
        "olmo_core.train.train_module",
        "olmo_core.train.callbacks",
        "olmo_core.data",
        *COMMON_MODULES,
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
    )

    def folder(self, step: int) -> str:
        return f"step{step}"

    def trainer(self, root: str, max_steps: int, work: str) -> Any:
        import numpy
        import torch
        from olmo_core.config import DType
        from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
        from olmo_core.distributed.parallel import DataParallelType
        from olmo_core.nn.transformer import TransformerConfig
        from olmo_core.optim import AdamWConfig, CosWithWarmup
        from olmo_core.train import Duration, TrainerConfig
        from olmo_core.train.callbacks import CheckpointerCallback
        from olmo_core.train.train_module import (
            TransformerDataParallelConfig,
            TransformerTrainModuleConfig,
        )
        from olmo_core.utils import seed_all

        data = os.path.join(work, "data.npy")
        if torch.distributed.get_rank() == 0:
            (numpy.arange(4096, dtype=numpy.uint16) % 60).tofile(data)
        torch.distributed.barrier()
        seed_all(1)
        tokenizer = TokenizerConfig(vocab_size=64, eos_token_id=0, pad_token_id=1)
        net = TransformerConfig.llama_like(vocab_size=64, d_model=16, n_layers=1, n_heads=2).build(
            init_device="meta"
        )
        parallel = TransformerDataParallelConfig(
            name=DataParallelType.fsdp, param_dtype=DType.float32, reduce_dtype=DType.float32
        )
        module = TransformerTrainModuleConfig(
            rank_microbatch_size=2 * 16,
            max_sequence_length=16,
            optim=AdamWConfig(lr=1e-3),
            compile_model=False,
            dp_config=parallel,
            scheduler=CosWithWarmup(warmup_steps=5),
        ).build(net, device=torch.device("cpu"))
        dataset = NumpyFSLDatasetConfig(
            paths=[data], sequence_length=16, tokenizer=tokenizer, work_dir=work
        ).build()
        loader = NumpyDataLoaderConfig(global_batch_size=4 * 16, seed=0, num_workers=0).build(
            dataset, dp_process_group=module.dp_process_group
        )
        keep = CheckpointerCallback(save_interval=2, save_async=False)
        return (
            TrainerConfig(
                save_folder=root,
                save_overwrite=True,
                max_duration=Duration.steps(max_steps),
                device="cpu",
                metrics_collect_interval=1,
            )
            .with_callback("checkpointer", keep)
            .build(module, loader)
        )

    def write(self, root: str, rank: int) -> None:
        trainer = self.trainer(root, max(self.steps), os.path.dirname(root))
        trainer.fit()

    def reader(self, rank: int) -> Load:
        import tempfile

        import torch

        work = [tempfile.mkdtemp(prefix="olmo-")] if rank == 0 else [None]
        torch.distributed.broadcast_object_list(work)
        trainer = self.trainer(os.path.join(str(work[0]), "none"), 9, str(work[0]))
        module = trainer.train_module

        def load(root: str, name: str) -> Leaves:
            with torch.no_grad():
                for one in module.model.parameters():
                    one.fill_(POISON)
            trainer.global_step = -1
            set_random_states(99)
            trainer.load_checkpoint(os.path.join(root, name))
            kept = {"module": module.state_dict(), "step": trainer.global_step}
            kept["random"] = random_states()
            kept["loader"] = trainer.data_loader.state_dict()
            return leaves(kept)

        return load


WRITERS = (Olmo,)
