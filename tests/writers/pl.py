"""Lightning's Trainer with ModelCheckpoint: one `.ckpt` file a checkpoint."""

from __future__ import annotations

import os
from typing import Any

from .contract import COMMON_MODULES, Leaves, Load, Writer, leaves
from .dcp import POISON, model
from .hf import _Stop


class Lightning(Writer):
    """`epoch=E-step=S.ckpt` and `last.ckpt`; loaded by `fit(ckpt_path=…)` up to a first batch."""

    name = "lightning-1"
    layout = "lightning"
    copies = ("last.ckpt",)
    save_last: Any = True
    preload = ("lightning.pytorch", *COMMON_MODULES)

    def folder(self, step: int) -> str:
        return f"epoch=0-step={step}.ckpt"

    def module(self) -> Any:
        import lightning.pytorch as lightning
        import torch

        class Net(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = model(8)

            def training_step(self, batch: Any, index: int) -> Any:
                return torch.nn.functional.cross_entropy(self.net(batch), batch)

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
                schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        return Net()

    def fit(self, root: str, max_steps: int, callbacks: list[Any], path: str | None) -> Any:
        import logging

        import lightning.pytorch as lightning
        import torch
        from lightning.pytorch.plugins.environments import LightningEnvironment

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        data = torch.utils.data.DataLoader(torch.arange(64) % 40, batch_size=4)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
            enable_checkpointing=path is None,
            plugins=[LightningEnvironment()],
        )
        net = self.module()
        if path:
            with torch.no_grad():
                for one in net.parameters():
                    one.fill_(POISON)
        trainer.fit(net, data, ckpt_path=path)
        return trainer

    def write(self, root: str, rank: int) -> None:
        from lightning.pytorch.callbacks import ModelCheckpoint

        keep = ModelCheckpoint(root, every_n_train_steps=2, save_top_k=-1, save_last=self.save_last)
        self.fit(root, max(self.steps), [keep], None)

    def reader(self, rank: int) -> Load:
        import lightning.pytorch as lightning

        def load(root: str, name: str) -> Leaves:
            seen: dict[str, Any] = {}

            class Look(lightning.Callback):
                def on_train_batch_start(
                    self, trainer: Any, module: Any, batch: Any, index: int
                ) -> None:
                    seen["step"] = trainer.global_step
                    seen["epoch"] = trainer.current_epoch
                    seen["batch"] = index
                    seen["model"] = module.state_dict()
                    seen["optimizer"] = trainer.optimizers[0].state_dict()
                    seen["scheduler"] = trainer.lr_scheduler_configs[0].scheduler.state_dict()
                    seen["leaves"] = leaves(seen)
                    raise _Stop

            try:
                self.fit("/tmp", max(self.steps) + 3, [Look()], os.path.join(root, name))
            except _Stop:
                pass
            return dict(seen["leaves"])

        return load


class Link(Lightning):
    """`save_last="link"`: `last.ckpt` leads to the newest, whatever becomes of that."""

    name = "lightning-link-1"
    copies = ()
    save_last = "link"


WRITERS = (Lightning, Link)
