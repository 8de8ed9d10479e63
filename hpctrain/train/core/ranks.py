"""The ranks of one job as torch.distributed sees them: join, wait, sum, leave. Nothing of any
framework."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hpctrain.base.errors import HpctrainError
from hpctrain.train.core.launch import Launch

Answer = TypeVar("Answer")


def join(launch: Launch, timeout_s: int) -> torch.device:
    """Join the other ranks over NCCL (or RCCL), gloo without a GPU; returns this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        if launch.num_ranks == 1:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(
                backend,
                rank=launch.rank,
                world_size=launch.num_ranks,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    return device


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def on_first(rank: int, work: Callable[[], Answer]) -> Answer:
    """What `work` answers on rank 0, on all ranks; an error there is raised on all of them."""
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except HpctrainError as error:
            told[1] = (type(error), error.problems)
        except Exception as error:
            dist.broadcast_object_list([None, (RuntimeError, f"rank 0 failed: {error!r}")])
            raise
    dist.broadcast_object_list(told)
    if told[1] is not None:
        kind, problems = told[1]
        raise kind(problems)
    answer: Answer = told[0]
    return answer


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def finish() -> None:
    """Leave the group, so that no rank is torn out of a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()
