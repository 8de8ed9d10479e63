"""hpctrain's own trainers: the same functions that save and load in a job, on a tiny model."""

from __future__ import annotations

import os
from typing import Any

from .contract import Leaves, Load, Writer, leaves
from .dcp import POISON, Dcp, poisoned, train_step
from .zero import Engine, poison


class Sft(Engine):
    """`hpctrain.train.core.checkpoint.save` (DeepSpeed, published by a rename); loaded as
    `sft.loop._resume` does."""

    name = "hpctrain-sft-2"
    num_ranks = num_readers = 2
    stage = 1
    says_its_step = ("hpctrain.json",)

    def progress(self, step: int) -> Any:
        from hpctrain.train.core.checkpoint import Progress

        return Progress(
            run_id="a",
            iteration=step,
            consumed_samples=4 * step,
            num_ranks=2,
            zero_stage=self.stage,
            precision="fp32",
            data_fingerprint="f",
            config={},
        )

    def save(self, engine: Any, root: str, step: int) -> None:
        import torch

        from hpctrain.train.core import checkpoint

        extra = {"config.json": b'{"model_type": "llama"}', "tokenizer.model": b"\n\x05abc" * 9}
        rank = torch.distributed.get_rank()
        checkpoint.save(engine, root, self.progress(step), extra, torch.distributed.barrier, rank)

    def reader(self, rank: int) -> Load:
        from hpctrain.train.core import checkpoint

        engine = self.engine()
        self.train(engine, 77)

        def load(root: str, name: str) -> Leaves:
            poison(engine)
            then = checkpoint.check_resume(os.path.join(root, name), self.progress(0))
            path, client = engine.load_checkpoint(root, tag=name)
            if path is None or client.get("hpctrain", {}).get("iteration") != then.iteration:
                raise RuntimeError("DeepSpeed could not load the checkpoint")
            return {**self.restored(engine, {}), **leaves(then.iteration, "progress")}

        return load


class Dpo(Writer):
    """`hpctrain.train.dpo.checkpoint.save` and `load` (DCP), published by a rename, on two
    ranks."""

    name = "hpctrain-dpo-2"
    layout = "dcp"
    num_ranks = num_readers = 2
    tracker = "latest"
    says_its_step = ("hpctrain.json",)
    preload = (*Dcp.preload, "hpctrain.train.dpo.checkpoint")

    def folder(self, step: int) -> str:
        return f"step-{step}"

    def progress(self, step: int) -> Any:
        from hpctrain.train.dpo.checkpoint import Progress

        return Progress(
            run_id="a",
            iteration=step,
            consumed_samples=4 * step,
            num_ranks=2,
            train_batch_size=4,
            precision="fp32",
            seed=1,
            data_fingerprint="f",
            reference_key="k",
            config={},
        )

    def write(self, root: str, rank: int) -> None:
        import torch

        from hpctrain.train.dpo import checkpoint

        net, optimizer = Dcp().make()
        for step in range(1, max(self.steps) + 1):
            train_step(net, optimizer, step)
            if step in self.steps:
                barrier = torch.distributed.barrier
                progress = self.progress(step)
                checkpoint.save(net, optimizer, root, progress, {"a": 1}, barrier, rank)

    def reader(self, rank: int) -> Load:
        import torch

        from hpctrain.train.dpo import checkpoint

        net, optimizer = Dcp().make()
        train_step(net, optimizer, 1)

        def load(root: str, name: str) -> Leaves:
            path = os.path.join(root, name)
            with torch.no_grad():
                for one in net.parameters():
                    one.fill_(POISON)
            for state in optimizer.state.values():
                state.update(poisoned(dict(state)))
            then = checkpoint.check_resume(path, self.progress(0))
            checkpoint.load(net, optimizer, path)
            kept = {"model": net.state_dict(), "optimizer": optimizer.state_dict()["state"]}
            return leaves({**kept, "iteration": then.iteration})

        return load


WRITERS = (Sft, Dpo)
