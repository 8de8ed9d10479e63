"""GAD's settings: what its scripts pass to verl, by stage and by size of the student.

Sources: microsoft/LMOps gad/scripts/train/gpt5-chat-filtered-7b-{warmup,adversarial}-lr1e-6.sh
(commit 4f2a9de) for the 7B values; the other sizes are scaled from it. Model shapes: `config.json`
of Qwen2.5-3B/7B/14B-Instruct and Qwen3-235B-A22B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STAGES = ("warmup", "adversarial")
BRANCHES = {"warmup": "warmup", "adversarial": "gad"}


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs of a model: numbers of parameters, layers, heads; widths of a token
    and of the vocabulary; `positions`: the longest sequence it knows
    (`max_position_embeddings`)."""

    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int


@dataclass(frozen=True)
class Size:
    """One row of the size table. `tokens_per_gpu` bounds one forward pass of the actor and of the
    critic."""

    shape: ModelShape
    tensor_parallel: int
    tokens_per_gpu: int
    train_batch: int
    val_batch: int
    mini_batch: int
    gpu_memory_utilization: float


SIZES: dict[str, Size] = {
    "3B": Size(ModelShape(3.09e9, 36, 2048, 16, 2, 151936, 32768), 2, 12288, 256, 600, 256, 0.7),
    "7B": Size(ModelShape(7.62e9, 28, 3584, 28, 4, 152064, 32768), 2, 12288, 256, 600, 256, 0.7),
    "14B": Size(ModelShape(14.77e9, 48, 5120, 40, 8, 152064, 32768), 4, 8192, 128, 300, 128, 0.8),
    "235B": Size(ModelShape(235.1e9, 94, 4096, 64, 4, 151936, 40960), 8, 4096, 64, 150, 64, 0.9),
}
# Rows that each parameter of a run may replace (`recipe_options.model_shape`).
SHAPE_KEYS = ("parameters", "layers", "hidden", "heads", "kv_heads", "vocab", "positions")


def overrides_of(stage: str, size: Size) -> dict[str, Any]:
    """The hydra overrides of a stage and size, in the order of GAD's scripts; what depends on the
    run comes on top."""
    warmup = stage == "warmup"
    values: Mapping[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "data.prompt_key": "content",
        "data.train_batch_size": size.train_batch,
        "data.val_batch_size": size.val_batch,
        "data.max_prompt_length": 2048,
        "data.max_response_length": 1536,
        "data.truncation": "right",
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.grad_clip": 0.2,
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": size.mini_batch,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": size.tokens_per_gpu,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.entropy_coeff": 0.0,
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
        "actor_rollout_ref.model.enable_gradient_checkpointing": True,
        "actor_rollout_ref.actor.fsdp_config.param_offload": False,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": False,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": size.tensor_parallel,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.temperature": 0.8,
        "actor_rollout_ref.rollout.gpu_memory_utilization": size.gpu_memory_utilization,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.ref.fsdp_config.param_offload": False,
        "critic.optim.lr": 1e-6,
        "critic.model.use_remove_padding": True,
        "critic.ppo_max_token_len_per_gpu": size.tokens_per_gpu,
        "critic.grad_clip": 0.2,
        "algorithm.kl_ctrl.kl_coef": 0.001,
        "trainer.val_before_train": True,
        "trainer.critic_warmup": 10 if warmup else 0,
        "trainer.project_name": "gad",
        "trainer.save_freq": 100,
        "trainer.test_freq": 100,
        "trainer.default_hdfs_dir": None,
        "trainer.total_epochs": 2 if warmup else 4,
        "actor_rollout_ref.rollout.enforce_eager": False,
        "actor_rollout_ref.rollout.free_cache_engine": False,
    }
    return dict(values)
