"""The one place that talks to DeepSpeed: start, engine, one step."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
import torch.distributed as dist

from hpctrain.config.trainers.sft import Batch, SftConfig
from hpctrain.train.core import ranks
from hpctrain.train.core.launch import Launch
from hpctrain.train.core.ranks import barrier as barrier
from hpctrain.train.core.ranks import finish as finish
from hpctrain.train.core.ranks import sum_over_ranks as sum_over_ranks
from hpctrain.train.sft.model import parameter_groups


def start(launch: Launch, timeout_s: int) -> torch.device:
    """Join the other ranks over NCCL (or RCCL), gloo without a GPU; returns this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce with g++ at start, on every node; gloo
    # needs nothing built.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    joined = dist.is_initialized()
    device = ranks.join(launch, timeout_s)
    if not joined:
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return device


def deepspeed_config(config: SftConfig, batch: Batch) -> dict[str, Any]:
    """DeepSpeed's JSON for a config. Every value that matters is written out: its defaults differ
    between releases."""
    bf16 = config.precision == "bf16"
    return {
        "train_batch_size": batch.train_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
        },
        "zero_allow_untested_optimizer": True,
        # Skips a step whose gradient is not finite instead of poisoning the weights.
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        # ZeRO sums bf16 gradients in fp32; stage 0 of DeepSpeed cannot.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and config.zero_stage else {}),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


@dataclass
class Stepper:
    """The engine, and one optimizer step over its micro batches."""

    engine: Any
    batch: Batch
    clip: float
    by_hand: bool  # fp32 without ZeRO: DeepSpeed neither reports the norm nor skips a step there
    skipped: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    def step(
        self, micro_batches: list[dict[str, Any]], lr: float, trained_tokens: int
    ) -> tuple[torch.Tensor, float, bool]:
        """One step; returns this rank's summed loss (on the device), the gradient norm, and whether
        it was skipped.

        The gradient is that of the loss per trained token over the whole batch of all ranks, so it
        does not depend on how rows are spread over ranks and forward passes.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed divides by the accumulation steps and averages over ranks.
        scale = self.batch.accumulation * self.batch.ranks / max(1, trained_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        norm = math.nan
        skipped_before = int(self.engine.skipped_steps)
        skipped_by_hand = False
        for number, arguments in enumerate(micro_batches):
            loss = self.engine(**arguments)
            total += loss.detach()
            self.engine.backward(loss * scale)
            if self.by_hand and number == len(micro_batches) - 1:
                norm = float(self._clip())
                if not math.isfinite(norm):
                    skipped_by_hand = True
                    for parameter in self.engine.module.parameters():
                        parameter.grad = None  # AdamW leaves a parameter without a gradient alone
            self.engine.step()
        if not self.by_hand:
            reported = self.engine.get_global_grad_norm()
            norm = math.nan if reported is None else float(reported)
        skipped = skipped_by_hand or int(self.engine.skipped_steps) > skipped_before
        self.skipped += skipped
        return total, norm, skipped

    def weights(self, rank: int) -> dict[str, torch.Tensor]:
        """All weights by name on the CPU, on rank 0; empty on the others. All ranks call it: ZeRO 3
        gathers them one by one."""
        out: dict[str, torch.Tensor] = {}
        for name, value in self.engine.module.state_dict(keep_vars=True).items():
            sharded = hasattr(value, "ds_id")
            with (
                deepspeed.zero.GatheredParameters([value]) if sharded else contextlib.nullcontext()
            ):
                if rank == 0:
                    out[name] = value.detach().cpu().clone()
        return out

    def _clip(self) -> torch.Tensor:
        limit = self.clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit)


def make_stepper(model: Any, config: SftConfig, batch: Batch) -> Stepper:
    """A DeepSpeed engine around `model` with AdamW in fp32."""
    by_hand = config.precision == "fp32" and config.zero_stage == 0
    settings = deepspeed_config(config, batch)
    if by_hand:
        settings["gradient_clipping"] = 0.0
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=torch.cuda.is_available(),
    )
    # DeepSpeed announces its memory use with print, whatever its log level is.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return Stepper(engine, batch, config.gradient_clipping, by_hand)
