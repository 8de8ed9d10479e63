"""What verl needs of a GPU's memory at least: a run that cannot fit is refused before it is queued.

Per GPU, for W ranks with full sharding (FSDP, ZeRO-3) and the rollout in the same processes (verl's
hybrid engine):

  trained model   16 bytes x parameters / W
                  fp32 weights 4, gradients 4, Adam's two moments 8 (ZeRO, arXiv:1910.02054, section
                  3.1; verl keeps fp32 masters of what it trains and bf16 of what it reads:
                  verl/workers/fsdp_workers.py); half of all with `fsdp_config.model_dtype: bf16`
  resting model   12 bytes x parameters / W
                  the other of actor and critic, without its gradients; `param_offload` takes 4 of
                  them away, `optimizer_offload` 8 (both come back to train)
  reference        2 bytes x parameters / W, bf16
  rollout          2 bytes x parameters / tensor parallel, vLLM's bf16 copy
  activations      2 bytes x tokens x (layers x hidden + vocab)
                  one input kept per checkpointed layer, bf16 logits of one sequence of full length;
                  no logits with `use_fused_kernels`

Training holds the trained and the resting model, reference and activations, and with
`free_cache_engine: false` the rollout; generating holds two resting models, reference and rollout.
The need is the greater of the two. Left out, so that it is a lower bound: vLLM's KV cache, what
FSDP gathers, NCCL's buffers, fragmentation, and what a micro-batch packs beside its longest
sequence (`ppo_max_token_len_per_gpu` is a ceiling, which no batch must reach).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.recipes.verl.presets import ModelShape

GIB = 1024**3
# Where each model's sharding is set: verl up to 0.8, and since.
_ACTOR = ("actor_rollout_ref.actor.fsdp_config",)
_CRITIC = ("critic.model.fsdp_config", "critic.fsdp")
_FUSED = "actor_rollout_ref.model.use_fused_kernels"
MOST_RANKS = 8192  # beyond that "more GPUs" is no advice


@dataclass(frozen=True)
class Need:
    """GiB of one GPU, by what takes them; `training` and `generating` are the sums of the two
    phases.

    `later`: what training takes after vLLM has taken its share: gradients, moments, activations.
    `host`: of one node.
    """

    trained: float
    resting: float
    reference: float
    rollout: float
    activations: float
    training: float
    generating: float
    later: float
    host: float

    @property
    def total(self) -> float:
        return max(self.training, self.generating)

    @property
    def words(self) -> str:
        """The parts of the greater phase."""
        named = {
            "trained model": self.trained,
            "resting model": self.resting,
            "reference": self.reference,
            "activations": self.activations,
            "rollout": self.rollout,
        }
        if self.generating > self.training:
            named = {
                "resting models": self.generating - self.reference - self.rollout,
                "reference": self.reference,
                "rollout": self.rollout,
            }
        return " + ".join(f"{what} {gib:.1f}" for what, gib in named.items()) + " GiB"


def need(
    shape: ModelShape,
    values: Mapping[str, Any],
    ranks: int,
    ranks_per_node: int,
    tensor_parallel: int,
    tokens: int,
) -> Need:
    """The least that one GPU (and, with offloading, one node's memory) must have; all models have
    the same shape."""
    share = shape.parameters / ranks / GIB
    models = (_ACTOR, _CRITIC)
    width = [0.5 if _set(values, model, "model_dtype") in _HALF else 1.0 for model in models]
    resting = [_resting_bytes(values, model) * half * share for model, half in zip(models, width)]
    trained = 16 * max(width) * share
    reference = (
        0.0 if values.get("actor_rollout_ref.ref.fsdp_config.param_offload") is True else 2 * share
    )
    rollout = 2 * shape.parameters / tensor_parallel / GIB
    logits = 0 if values.get(_FUSED) is True else shape.vocab
    activations = 2 * tokens * (shape.layers * shape.hidden + logits) / GIB
    stays = rollout if values.get("actor_rollout_ref.rollout.free_cache_engine") is False else 0.0
    return Need(
        trained=trained,
        resting=max(resting),
        reference=reference,
        rollout=rollout,
        activations=activations,
        training=trained + max(resting) + reference + activations + stays,
        generating=sum(resting) + reference + rollout,
        later=0.75 * trained + min(max(resting), 8 * share) + activations,
        host=(12 * sum(width) * share - sum(resting) + (2 * share - reference)) * ranks_per_node,
    )


def least_ranks(
    shape: ModelShape,
    values: Mapping[str, Any],
    gpu_gib: float,
    ranks_per_node: int,
    tensor_parallel: int,
    tokens: int,
) -> int | None:
    """The least number of GPUs, in whole nodes, on which it could fit; None when no sensible number
    is enough."""
    for ranks in range(ranks_per_node, MOST_RANKS + 1, ranks_per_node):
        if need(shape, values, ranks, ranks_per_node, tensor_parallel, tokens).total <= gpu_gib:
            return ranks
    return None


_HALF = ("bf16", "bfloat16", "fp16", "float16")


def _resting_bytes(values: Mapping[str, Any], model: Sequence[str]) -> int:
    weights = 0 if _set(values, model, "param_offload") is True else 4
    moments = 0 if _set(values, model, "optimizer_offload") is True else 8
    return weights + moments


def _set(values: Mapping[str, Any], places: Sequence[str], name: str) -> Any:
    """The value of a key in any of its places, with hydra's `+` before it or without."""
    keys = [prefix + f"{place}.{name}" for place in places for prefix in ("", "+", "++")]
    return next((values[key] for key in keys if key in values), None)
