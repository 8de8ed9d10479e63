"""Checkpoints of programs that do not run on a CPU or from the package index, built after their
sources.

Each file is made by the function that the program itself uses (torch.save, safetensors), and loaded
as its loader does: what it opens by name is opened, what it looks for and does without is left out
in silence.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .contract import Leaves, Load, Writer, leaves


class Tree(Writer):
    """`needed` files raise when they cannot be read, `silent` ones are left out when they are not
    there, others unread."""

    built = "built"
    preload = ("torch", "safetensors.torch")

    def needed(self) -> list[str]:
        raise NotImplementedError

    def silent(self) -> list[str]:
        return []

    def unread(self) -> dict[str, str]:
        """Files that no loader opens, with their text."""
        return {}

    def order(self) -> list[str]:
        return [*self.needed(), *self.silent(), *self.unread()]

    def value(self, path: str, step: int) -> Any:
        """What a file holds, different at each step."""
        import torch

        seed = sum(path.encode()) + 1000 * step
        data = torch.randn(23, 31, generator=torch.Generator().manual_seed(seed))
        return {"weight": data, "iteration": step}

    def tracker_text(self, step: int) -> str:
        return str(step)

    def write(self, root: str, rank: int) -> None:
        for step in self.steps:
            for path in self.order():
                full = os.path.join(root, self.folder(step), path)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                text = self.unread().get(path)
                if text is None:
                    save(full, self.value(path, step))
                else:
                    with open(full, "w") as stream:
                        stream.write(text)
            self.tell(root, step)

    def reader(self, rank: int) -> Load:
        def load(root: str, name: str) -> Leaves:
            top = os.path.join(root, name)
            found = {path: read(os.path.join(top, path)) for path in self.needed()}
            for path in self.silent():
                if os.path.exists(os.path.join(top, path)):
                    found[path] = read(os.path.join(top, path))
            return leaves(found)

        return load


def save(path: str, value: Any) -> None:
    import torch
    from safetensors.torch import save_file

    if path.endswith(".safetensors"):
        save_file({"data": value["weight"]}, path)
    elif path.endswith(".json"):
        with open(path, "w") as stream:
            json.dump(value, stream, indent=2)
    else:
        torch.save(value, path)


def read(path: str) -> Any:
    import torch
    from safetensors.torch import load_file

    if path.endswith(".safetensors"):
        return load_file(path)
    if path.endswith(".json"):
        with open(path) as stream:
            return json.load(stream)
    return torch.load(path, weights_only=False, map_location="cpu")


class MegatronLegacy(Tree):
    """Megatron-LM `--ckpt-format torch`, TP 2: checkpointing.py `get_checkpoint_name` (230),
    `_load_base_checkpoint` (2100)."""

    name = "megatron-legacy-tp2"
    layout = "megatron"
    tracker = "latest_checkpointed_iteration.txt"

    parallel = (2, 1, 1)  # tensor, pipeline, expert

    def folder(self, step: int) -> str:
        return f"iter_{step:07d}"

    def needed(self) -> list[str]:
        return [f"mp_rank_{tp:02d}/model_optim_rng.pt" for tp in range(2)]

    def value(self, path: str, step: int) -> Any:
        """As `generate_state_dict` puts it together: the arguments are those of the whole run."""
        import argparse

        inside = super().value(path, step)
        if path.endswith("distrib_optim.pt"):
            return {0: {"param": inside["weight"], "exp_avg": inside["weight"] + 1}}
        tensor, pipeline, expert = self.parallel
        args = argparse.Namespace(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=expert,
            use_distributed_optimizer=any("distrib" in one for one in self.needed()),
            ckpt_format="torch",
            world_size=tensor * pipeline * expert,
        )
        told = {"args": args, "checkpoint_version": 3.0, "iteration": step}
        return {**told, "model": {"weight": inside["weight"]}, "rng_state": [step]}


class MegatronPipeline(MegatronLegacy):
    """TP 2 x PP 2."""

    name = "megatron-legacy-tp2-pp2"
    parallel = (2, 2, 1)

    def needed(self) -> list[str]:
        ranks = [f"mp_rank_{tp:02d}_{pp:03d}" for tp in range(2) for pp in range(2)]
        return [f"{rank}/model_optim_rng.pt" for rank in ranks]


class MegatronExperts(MegatronLegacy):
    """TP 2 x PP 2 x EP 2."""

    name = "megatron-legacy-moe"
    parallel = (2, 2, 2)

    def needed(self) -> list[str]:
        ranks = [(tp, pp, ep) for tp in range(2) for pp in range(2) for ep in range(2)]
        return [f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}/model_optim_rng.pt" for tp, pp, ep in ranks]


class MegatronExpertsOnly(MegatronLegacy):
    """TP 2 x EP 2, no pipeline: the second number is the expert rank."""

    name = "megatron-legacy-tp2-ep2"
    parallel = (2, 1, 2)

    def needed(self) -> list[str]:
        ranks = [f"mp_rank_{tp:02d}_{ep:03d}" for tp in range(2) for ep in range(2)]
        return [f"{rank}/model_optim_rng.pt" for rank in ranks]


class MegatronDistributedOptimizer(MegatronLegacy):
    """With the distributed optimizer: `distrib_optim.pt` beside each model file (296, 2990)."""

    name = "megatron-legacy-distopt"

    def needed(self) -> list[str]:
        kinds = ("distrib_optim.pt", "model_optim_rng.pt")
        return [f"mp_rank_{tp:02d}/{kind}" for tp in range(2) for kind in kinds]


class Verl(Tree):
    """verl with FSDP: fsdp_checkpoint_manager.py `save_checkpoint`, `load_checkpoint`;
    ray_trainer.py (1032, 1102)."""

    name = "verl-fsdp-2"
    layout = "verl"
    tracker = "latest_checkpointed_iteration.txt"
    roles = ("actor", "critic")
    ranks = 2

    def could_be_whole(self, left: set[str]) -> bool:
        """GRPO and its like have no critic."""
        actor = {one for one in self.needed() if one.startswith("actor/")}
        return left >= {*actor, "data.pt"} and not any(one.startswith("critic/") for one in left)

    def folder(self, step: int) -> str:
        return f"global_step_{step}"

    def needed(self) -> list[str]:
        kinds = ("model", "optim", "extra_state")
        parts = [
            (role, kind, rank)
            for role in self.roles
            for kind in kinds
            for rank in range(self.ranks)
        ]
        return [
            f"{role}/{kind}_world_size_{self.ranks}_rank_{rank}.pt" for role, kind, rank in parts
        ]

    def silent(self) -> list[str]:
        return ["data.pt"]

    def unread(self) -> dict[str, str]:
        texts = {"fsdp_config.json": '{"FSDP_version": 2, "world_size": 2}'}
        texts |= {"huggingface/config.json": "{}", "huggingface/tokenizer_config.json": "{}"}
        return {f"{role}/{name}": text for role in self.roles for name, text in texts.items()}


class VerlActor(Verl):
    """GRPO: no critic, four ranks."""

    name = "verl-fsdp-actor-4"
    roles = ("actor",)
    ranks = 4


class Nanotron(Tree):
    """nanotron, TP 2 x DP 2 with ZeRO 1: serialize/{main,weights,optimizer,random,metadata}.py.

    Names tell of how many ranks each is one; optimizer_config.json names the parameters.
    """

    name = "nanotron-tp2-dp2"
    layout = "nanotron"
    tracker = "latest.txt"
    sharded = (
        "token_position_embeddings.pp_block.token_embedding",
        "decoder.0.pp_block.attn.qkv_proj",
    )
    plain = ("decoder.0.pp_block.input_layernorm",)

    def folder(self, step: int) -> str:
        return str(step)

    def needed(self) -> list[str]:
        of_rank = "model_weight_pp-rank-0-of-1_tp-rank-{}-of-2.safetensors"
        weights = [f"{layer}.{of_rank.format(tp)}" for layer in self.sharded for tp in range(2)]
        weights += [f"{layer}.model_weight.safetensors" for layer in self.plain]
        folders = [one.rsplit(".model_weight", 1) for one in weights]
        ranks = [(dp, tp) for dp in range(2) for tp in range(2)]
        shards = [f"pp-0-of-1_dp-{dp}-of-2_tp-{tp}-of-2_exp-0-of-1.pt" for dp, tp in ranks]
        return [
            *(f"model/model/{top.replace('.', '/')}/model_weight{end}" for top, end in folders),
            "optimizer/optimizer_config.json",
            *(f"optimizer/optimizer_{shard}" for shard in shards),
            *(f"lr_scheduler/lr_scheduler_{shard}" for shard in shards),
            *(f"random/tp-{tp}-of-2_dp-{dp}-of-2_pp-0-of-1.pt" for dp, tp in ranks),
            "checkpoint_metadata.json",
        ]

    def value(self, path: str, step: int) -> Any:
        if path == "checkpoint_metadata.json":
            told = {"last_train_step": step, "consumed_train_samples": 8 * step}
            return {"version": "1.4", "tp": 2, "dp": 2, "metas": told, "custom_metas": None}
        if path == "optimizer/optimizer_config.json":
            sizes = {"tp_size": "2", "dp_size": "2", "pp_size": "1", "expert_parallel_size": "1"}
            names = [f"model.{layer}.weight" for layer in (*self.sharded, *self.plain)]
            configs = {
                "param_name_to_dp_rank_offsets": {name: {"0": ["0", "9"]} for name in names},
                "orig_param_shapes": dict.fromkeys(names, "torch.Size([23, 31])"),
            }
            kind = "ZeroDistributedOptimizer"
            return {"type": kind, "parallelism": sizes, "configs": configs}
        return super().value(path, step)

    def unread(self) -> dict[str, str]:
        return {"config.yaml": "general: {run: x}\n", "model_config.json": "{}"}


WRITERS = (
    MegatronLegacy,
    MegatronPipeline,
    MegatronExperts,
    MegatronExpertsOnly,
    MegatronDistributedOptimizer,
    Verl,
    VerlActor,
    Nanotron,
)
