"""Every checkpoint layout by name, each with its own rule for "complete"."""

import json
import os
import re
from typing import Dict, List, Optional, Tuple

from .deepspeed import DeepSpeed
from .files import Listing, read_text
from .layout import Expected, Folder, Layout, implausible, missing, opened


class Megatron(Layout):
    """`iter_XXXXXXX/` with `latest_checkpointed_iteration.txt` beside it.

    Complete when either every `mp_rank_TT[_PPP]/` folder holds a `model_optim_rng.pt` (or `model_rng.pt`) that opens,
    without a gap in the ranks (megatron/training/checkpointing.py `get_checkpoint_name`), or, in the `torch_dist`
    format, `.metadata`, `metadata.json`, `common.pt` and every `.distcp` file it was saved with are there. The tracker
    is written after a barrier over all ranks (`save_checkpoint`), but not atomically; the word `release` in it names
    the folder `release`.
    """

    name = "megatron"
    pattern = re.compile(r"iter_(\d{7,})\Z", re.ASCII)
    tracker = "latest_checkpointed_iteration.txt"
    by_link = True
    depth = 1
    _RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?/(?:model_optim_rng|model_rng)\.pt\Z")

    def folder_name(self, number: int) -> str:
        return "iter_{:07d}".format(number)

    def named_by(self, text: str) -> Optional[str]:
        return _numbered(self, text) if text.strip() != "release" else "release"

    def tracker_text(self, name: str) -> str:
        return name if name == "release" else str(self.number(name))

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        if any(name.endswith(".distcp") for name in folder.files) or "metadata.json" in folder.files:
            faults += [
                "`{}` is missing".format(name) for name in ("metadata.json", "common.pt") if name not in folder.files
            ]
            faults += _distcp_faults(folder)
            return
        found = folder.matching(self._RANK)
        if not found:
            faults.append("no model states in it")
            return
        staged = any(len(key) == 2 for key in found)
        tensor = expected.tensor_parallel or max(key[0] for key in found) + 1
        stages = (expected.pipeline_parallel or max(key[-1] for key in found) + 1) if staged else 1
        wanted = [(tp, pp) if staged else (tp,) for tp in range(tensor) for pp in range(stages)]
        form = "mp_rank_{:02d}_{:03d}/model_optim_rng.pt" if staged else "mp_rank_{:02d}/model_optim_rng.pt"
        faults += missing("model files", wanted, set(found), form.format)
        files = [name for name in folder.files if name.endswith(".pt")]
        faults += opened(folder, files)
        stages_of: Dict[int, List[str]] = {}
        for key, name in found.items():
            stages_of.setdefault(key[-1] if staged else 0, []).append(name)
        faults += implausible(folder, stages_of.values())


class Verl(Layout):
    """`global_step_N/` with `latest_checkpointed_iteration.txt` beside it.

    Complete when `actor/` (and `critic/`, where there is one) holds `model`, `optim` and `extra_state` files
    `…_world_size_W_rank_R.pt` for every rank of one world size W, the same in both, and `data.pt` is there
    (verl/utils/checkpoint/fsdp_checkpoint_manager.py, trainer/ppo/ray_trainer.py `_save_checkpoint`, which writes the
    tracker last). With `async_save` the tracker is not written at all, so it is not asked.
    """

    name = "verl"
    pattern = re.compile(r"global_step_(\d+)\Z", re.ASCII)
    tracker = "latest_checkpointed_iteration.txt"
    by_link = True
    depth = 1
    _SHARD = re.compile(r"(actor|critic)/(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt\Z")

    def folder_name(self, number: int) -> str:
        return "global_step_{}".format(number)

    def named_by(self, text: str) -> Optional[str]:
        return _numbered(self, text)

    def tracker_text(self, name: str) -> str:
        return str(self.number(name))

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        found: Dict[Tuple[str, str, int], Dict[int, str]] = {}
        for name in folder.files:
            match = self._SHARD.match(name)
            if match:
                role, kind, world, rank = match.groups()
                found.setdefault((role, kind, int(world)), {})[int(rank)] = name
        worlds = sorted({world for _, _, world in found})
        if not any(role == "actor" for role, _, _ in found):
            faults.append("no shards of the actor in it")
            return
        if len(worlds) > 1:
            faults.append("shards of world sizes {} lie in one checkpoint".format(", ".join(map(str, worlds))))
        roles = ["actor"] + (["critic"] if any(name.startswith("critic/") for name in folder.files) else [])
        for role in roles:
            for kind in ("model", "optim", "extra_state"):
                form = role + "/" + kind + "_world_size_{}_rank_{{}}.pt".format(worlds[-1])
                ranks = found.get((role, kind, worlds[-1]), {})
                faults += missing("{} shards of the {}".format(kind, role), range(worlds[-1]), set(ranks), form.format)
        if "data.pt" not in folder.files:
            faults.append("`data.pt`, the position in the data, is missing")
        faults += opened(folder, [name for name in folder.files if name.endswith(".pt")])
        faults += implausible(folder, [list(ranks.values()) for ranks in found.values()])


class HfTrainer(Layout):
    """`checkpoint-N/`, as transformers' Trainer and TRL write it; no tracker.

    Complete when `trainer_state.json`, which is written last, parses and has `global_step` N, the weights open (and
    every shard that an index names is there), optimizer, scheduler and random state are there, and no
    `checkpoint-is-incomplete.txt` is (transformers/trainer.py `_save_checkpoint`). The Trainer itself takes the greatest
    N without any test (trainer_utils.py `get_last_checkpoint`).
    """

    name = "hf-trainer"
    pattern = re.compile(r"checkpoint-(\d+)\Z", re.ASCII)
    greatest = True
    depth = 1

    def folder_name(self, number: int) -> str:
        return "checkpoint-{}".format(number)

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        names = set(folder.files)
        if "checkpoint-is-incomplete.txt" in names:
            faults.append("`checkpoint-is-incomplete.txt` marks it as interrupted")
        state = _json(folder, "trainer_state.json")
        if state is None:
            faults.append("`trainer_state.json`, which is written last, is missing or cut short")
        elif state.get("global_step") != self.number(os.path.basename(folder.path)) and not os.path.islink(folder.path):
            faults.append("`trainer_state.json` is of step {}".format(state.get("global_step")))
        if not any(name.startswith("rng_state") for name in names):
            faults.append("`rng_state.pth` is missing")
        deepspeed = any("optim_states.pt" in name for name in names)
        if not deepspeed and not any(name.startswith("optimizer") for name in names):
            faults.append("the optimizer's state is missing")
        faults += _weights_faults(folder)
        faults += opened(folder, [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))])


class OpenInstruct(Layout):
    """`step_N/` and `epoch_N/`, as open-instruct's finetune.py and dpo_tune_cache.py write them; no tracker.

    Complete when `COMPLETED` is there, with `random_states_0 … W-1.pkl` without a gap, and either the weights and
    optimizer of accelerate's `save_state` or whole ZeRO shards in `pytorch_model/` (open_instruct/utils.py
    `get_last_checkpoint`). The marker alone proves nothing: it is written into the greatest folder, which after a crash
    is not the one that was saved. `step_*` is preferred to `epoch_*`.
    """

    name = "open-instruct"
    pattern = re.compile(r"(?:step|epoch)_(\d+)\Z", re.ASCII)
    greatest = True
    depth = 1

    def folder_name(self, number: int) -> str:
        return "step_{}".format(number)

    def order(self, name: str) -> Tuple[int, int]:
        return (1 if name.startswith("step_") else 0, self.number(name) or 0)

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        names = set(folder.files)
        if "COMPLETED" not in names:
            faults.append("`COMPLETED` is missing")
        ranks = {key[0] for key in folder.matching(re.compile(r"random_states_(\d+)\.pkl\Z"))}
        faults += missing("random states", range(max(ranks) + 1 if ranks else 1), ranks, "random_states_{}.pkl".format)
        below = {
            name[len("pytorch_model/") :]: info
            for name, info in folder.files.items()
            if name.startswith("pytorch_model/")
        }
        if below:
            inner = Folder.__new__(Folder)
            inner.path, inner.files, inner.previous = os.path.join(folder.path, "pytorch_model"), below, {}
            processes = expected.data_parallel or len(ranks) or None
            DeepSpeed().judge(
                inner, Expected(data_parallel=processes, zero_stage=expected.zero_stage), faults, mismatches
            )
            return
        faults += _weights_faults(folder)
        if not any(name.startswith("optimizer") for name in names):
            faults.append("the optimizer's state is missing")
        faults += opened(folder, [name for name in names if name.endswith((".bin", ".pt", ".safetensors", ".pkl"))])

    def export_faults(self, folder: str, name: str, listing: Listing) -> List[str]:
        """The weights (every shard that their index names) and the tokenizer, which is written last, after checkpoint
        `name` was (open_instruct/model_utils.py `save_with_accelerate`)."""
        top = Folder(folder, listing)
        faults = _weights_faults(top)
        weights = [file for file in top.files if file.endswith((".bin", ".safetensors"))]
        faults += opened(top, weights)
        last = top.files.get("tokenizer_config.json")
        marker = listing.files(os.path.join(folder, name)).get("COMPLETED")
        if last is None:
            faults.append("`tokenizer_config.json` is missing")
        elif marker is not None and last.mtime_ns < marker.mtime_ns:
            faults.append("the exported model is older than `{}`".format(name))
        return faults


class Dcp(Layout):
    """A folder per step in PyTorch's distributed checkpoint format (`step-N`, `step_N`, `stepN` or `checkpoint-N`).

    Complete when `.metadata` is there, not empty, and every rank R that wrote has its files `__R_I.distcp` from I = 0
    without a gap: the coordinator writes `.metadata` by rename after all ranks have finished
    (torch/distributed/checkpoint/filesystem.py `finish`, storage layout of `FileSystemWriter`). A `latest` beside the
    folders is followed where there is one.
    """

    name = "dcp"
    tracker_optional = True
    greatest = True
    pattern = re.compile(r"(?:global_)?(?:step|checkpoint|iter)[-_]?(\d+)\Z", re.ASCII)
    tracker = "latest"
    depth = 1

    def folder_name(self, number: int) -> str:
        return "step-{}".format(number)

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        faults += _distcp_faults(folder)


class NoCheckpoints(Layout):
    """A program that keeps no checkpoints hpctrain knows of: nothing is ever found, so nothing can be incomplete."""

    name = "none"

    def folder_name(self, number: int) -> str:
        return str(number)

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        faults.append("the layout `none` has no rule for a complete checkpoint")


LAYOUTS: Dict[str, Layout] = {
    layout.name: layout
    for layout in (DeepSpeed(), Megatron(), Verl(), HfTrainer(), OpenInstruct(), Dcp(), NoCheckpoints())
}


def _numbered(layout: Layout, text: str) -> Optional[str]:
    text = text.strip()
    return layout.folder_name(int(text)) if re.match(r"\d{1,18}\Z", text, re.ASCII) else None


def _json(folder: Folder, name: str) -> Optional[Dict[str, object]]:
    if name not in folder.files:
        return None
    text = read_text(os.path.join(folder.path, name), 256 * 1024 * 1024)
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _weights_faults(folder: Folder) -> List[str]:
    top = {name for name in folder.files if "/" not in name}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in top:
            found = _json(folder, index)
            shards_of = found.get("weight_map") if found else None
            if not isinstance(shards_of, dict):
                return ["`{}` is cut short".format(index)]
            return missing("weight files", sorted(set(map(str, shards_of.values()))), top, "{}".format)
    weights = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
    sharded = any("model_states.pt" in name or name.endswith(".distcp") for name in folder.files)
    return [] if sharded or any(name in top for name in weights) else ["the weights are missing"]


def _distcp_faults(folder: Folder) -> List[str]:
    faults = []
    if folder.files.get(".metadata") is None or folder.files[".metadata"].size == 0:
        faults.append("`.metadata`, which is written last, is missing or empty")
    found = {(key[0], key[1]) for key in folder.matching(re.compile(r"__(\d+)_(\d+)\.distcp\Z"))}
    if not found:
        return faults + ["no `.distcp` files in it"]
    last: Dict[int, int] = {}
    for rank, part in found:
        last[rank] = max(part, last.get(rank, 0))
    wanted = [(rank, part) for rank in sorted(last) for part in range(last[rank] + 1)]
    faults += missing("files", wanted, found, "__{}_{}.distcp".format)
    return faults + opened(folder, [name for name in folder.files if name.endswith(".distcp")])
