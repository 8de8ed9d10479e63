"""The model over the ranks: sharded (FSDP2) or a whole copy on each, weights in, weights out, and
its optimizer.

One process in fp32 needs none of it and gets the plain model. Everything else is `fully_shard`ed:
over all ranks with `fsdp`, else over none with the gradients summed (a mesh of so many copies of
one shard), so that bf16 compute, fp32 weights and fp32 gradient sums are the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hpctrain.config.trainers.dpo import DpoConfig
from hpctrain.train.core import ranks
from hpctrain.train.dpo.model import model_class
from hpctrain.train.sft.model import parameter_groups

Weights = Callable[[], dict[str, torch.Tensor]]


def is_plain(config: DpoConfig) -> bool:
    """Whether the model stays as it is: one process, fp32."""
    return dist.get_world_size() == 1 and config.precision == "fp32"


def place(
    model_config: Any, config: DpoConfig, device: torch.device, read: Weights | None, rank: int
) -> Any:
    """The model on its ranks, with the weights that `read` gives on rank 0 (the only full copy), or
    none yet.

    Never more than one full copy in a job's memory, and that on the CPU of rank 0.
    """
    # Buffers are real: no checkpoint holds them.
    with accelerate.init_empty_weights(include_buffers=False):
        model = model_class(model_config)(model_config)
    model.tie_weights()  # moving to meta made two of one
    model.train()
    layers = model.base_model.layers
    if config.training["activation_checkpointing"]:
        for number, layer in enumerate(layers):
            layers[number] = checkpoint_wrapper(layer)
    if not is_plain(config):
        options: dict[str, Any] = {
            "mesh": _mesh(config, device),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if config.precision == "bf16" else None,
                reduce_dtype=torch.float32,
            ),
        }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=config.training["fsdp"], **options)
        fully_shard(model, **options)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if read is not None:
        weights: dict[str, torch.Tensor] = {}
        # what is wrong with them ends all ranks
        ranks.on_first(rank, lambda: weights.update(read()))
        put_weights(model, weights)
    return model


def put_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put full weights, given on rank 0 and empty elsewhere, into a placed model."""
    options = state_dicts.StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1
    )
    state_dicts.set_model_state_dict(model, weights, options=options)


def full_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights on the CPU of rank 0, empty on the others; every rank must call it."""
    options = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(state_dicts.get_model_state_dict(model, options=options))


def reshard(model: Any) -> None:
    """Give back what a forward pass without a backward pass left gathered.

    Until then `parameters()` of the root are whole tensors that FSDP throws away: an optimizer made
    of them trains nothing of the embedding, the last norm and the head, while the loss still falls.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def make_optimizer(model: Any, config: DpoConfig) -> torch.optim.AdamW:
    """AdamW over the fp32 weights. Raises RuntimeError if any of them is not what FSDP shards (see
    `reshard`)."""
    values = config.training
    optimizer = torch.optim.AdamW(
        parameter_groups(model, values["weight_decay"]),
        lr=values["learning_rate"],
        betas=(values["adam_beta1"], values["adam_beta2"]),
        eps=values["adam_eps"],
        fused=torch.cuda.is_available(),
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(model, FSDPModule) and not isinstance(parameter, DTensor):
                raise RuntimeError(
                    "the optimizer was given a gathered parameter; reshard the model first"
                )
    return optimizer


def hold_gradients(model: Any, config: DpoConfig, last: bool) -> None:
    """Before a forward pass: whether its backward pass sums gradients over ranks. Whole copies wait
    for the last one."""
    if isinstance(model, FSDPModule) and not config.training["fsdp"]:
        model.set_requires_gradient_sync(last)


def clip(model: Any, limit: float) -> float:
    """Scale the gradients to a norm of at most `limit` (0: any); returns the norm before, over all
    ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm)


def _mesh(config: DpoConfig, device: torch.device) -> Any:
    world = dist.get_world_size()
    if config.training["fsdp"]:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world, 1), mesh_dim_names=("replicate", "shard"))
