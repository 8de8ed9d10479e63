"""How verl, OLMo-core, Lightning and nanotron write a checkpoint, and single files."""

import os
import re
from typing import Dict, List, Set, Tuple

from . import shards
from .dcp import judge_index
from .huggingface import deepspeed_tag, judge_deepspeed, whole_files
from .layout import (
    Expected,
    Folder,
    Form,
    Report,
    json_faults,
    missing,
    opened,
    read_json,
    shape_of,
)


class Verl(Form):
    """verl's `global_step_N/`: `actor/` (and `critic/`, where there is one) hold `model`, `optim`
    and `extra_state` files `…_world_size_W_rank_R.pt` for every rank of one world size W, the same
    in both, and `data.pt`, the position in the data, is there
    (verl/utils/checkpoint/fsdp_checkpoint_manager.py, trainer/ppo/ray_trainer.py
    `_save_checkpoint`).
    """

    name = "verl"
    marks = re.compile(r"(?:actor|critic)/.*|transfer_queue/.*|data\.pt\Z")
    writes = marks
    _SHARD = re.compile(
        r"(actor|critic)/(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt\Z"
    )

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        shard_files = self._shards(folder)
        if "data.pt" not in folder.files:
            report.torn.append("`data.pt`, the position in the data, is missing")
        report.torn += opened(folder, [name for name in folder.files if name.endswith(".pt")])
        if not any(role == "actor" for role, _, _ in shard_files):
            if any("dist_ckpt/" in name for name in folder.files):
                self._judge_dist(folder, report)
            else:
                self.lacking(folder, report, ["no shards of the actor in it"])
            return
        worlds = sorted({world for _, _, world in shard_files})
        if len(worlds) > 1:
            shown = ", ".join(map(str, worlds))
            report.torn.append("shards of world sizes {} lie in one checkpoint".format(shown))
        if expected.data_parallel and worlds != [expected.data_parallel]:
            line = "was saved by {} ranks, and the plan has {}: no other number can load it"
            report.refuse(line.format(worlds[-1], expected.data_parallel))
        before = self._shards(Folder(folder.path, folder.previous))
        self._judge_roles(folder, shard_files, before, worlds[-1], report)

    def _shards(self, folder: Folder) -> Dict[Tuple[str, str, int], Set[int]]:
        found: Dict[Tuple[str, str, int], Set[int]] = {}
        for match in map(self._SHARD.match, folder.files):
            if match:
                role, kind, world, rank = match.groups()
                found.setdefault((role, kind, int(world)), set()).add(int(rank))
        return found

    def _judge_roles(
        self,
        folder: Folder,
        there: Dict[Tuple[str, str, int], Set[int]],
        before: Dict[Tuple[str, str, int], Set[int]],
        world: int,
        report: Report,
    ) -> None:
        roles = ["actor"]
        if "critic" in folder.folders() or any(role == "critic" for role, _, _ in before):
            roles.append("critic")
        unfinished = bool(report.torn)
        for role in roles:
            for kind in ("model", "optim", "extra_state"):
                ranks = there.get((role, kind, world), set())
                form = "{}/{}_world_size_{}_rank_{{}}.pt".format(role, kind, world)
                what = "{} shards of the {}".format(kind, role)
                lost = missing(what, range(world), ranks, form.format)
                saved_before = any(key[:2] == (role, kind) for key in before)
                if ranks or unfinished or saved_before or kind == "model":
                    report.torn += lost
                else:
                    # `checkpoint.save_contents` may leave a kind out; then nothing can resume it.
                    report.unknown += lost

    @staticmethod
    def _judge_dist(folder: Folder, report: Report) -> None:
        """verl on Megatron: `actor/dist_ckpt/` is a torch_dist checkpoint."""
        for role in sorted({name.split("/")[0] for name in folder.files if "/dist_ckpt/" in name}):
            part = folder.below(role)
            judge_index(part, "dist_ckpt", report)
            for name in ("dist_ckpt/metadata.json", "dist_ckpt/common.pt"):
                if name not in part.files:
                    report.torn.append("`{}/{}` is missing".format(role, name))
            report.torn += json_faults(part, ["dist_ckpt/metadata.json"], role + "/")


class OlmoCore(Form):
    """OLMo-core's `stepN/` (olmo_core/train/checkpoint.py `dir_is_checkpoint`, `load`):
    `train/rank0.pt`, which stands in for a rank whose own is not there, `model_and_optim/` with the
    files that its `.metadata` names, and `.metadata.json`, which is written last."""

    name = "OLMo-core"
    marks = re.compile(r"\.metadata\.json\Z|model_and_optim/.*|train/rank\d+\.pt\Z")
    writes = re.compile(marks.pattern + r"|config\.json\Z|data_paths\.txt\Z")
    _RANK = re.compile(r"train/rank(\d+)\.pt\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        if ".metadata.json" not in folder.files:
            report.torn.append("`.metadata.json`, which is written last, is missing")
        elif folder.files[".metadata.json"].size <= 0:
            report.unknown.append("`.metadata.json` is empty")
        if "model_and_optim" in folder.folders():
            judge_index(folder, "model_and_optim", report)
        else:
            self.lacking(folder, report, ["`model_and_optim/` is missing"])
        ranks = {key[0]: name for key, name in folder.matching(self._RANK).items()}
        report.torn += opened(folder, ranks.values())
        if not ranks:
            self.lacking(folder, report, ["`train/rank0.pt` is missing"])
            return
        if 0 not in ranks:
            report.torn.append(
                "`train/rank0.pt`, which stands in for every other rank's, is missing"
            )
        path = os.path.join(folder.path, ranks[min(ranks)])
        step = shards.top_values(path, ("global_step",)).get("global_step")
        report.iteration = step if isinstance(step, int) else None
        name = re.search(r"step(\d+)\Z", os.path.basename(folder.path))
        if name and isinstance(step, int) and step != int(name.group(1)):
            report.torn.append("`{}` is of step {}".format(ranks[min(ranks)], step))


class LightningFolder(Form):
    """A Lightning `.ckpt` that is a folder: of FSDP (`meta.pt` and a distributed checkpoint,
    lightning/fabric/strategies/fsdp.py `save_checkpoint`) or of DeepSpeed (`checkpoint/`,
    `latest`).
    """

    name = "Lightning sharded"
    marks = re.compile(r"meta\.pt\Z|checkpoint/.*_states\.pt\Z")
    writes = re.compile(marks.pattern + r"|.*\.metadata\Z|.*\.distcp\Z|latest\Z|zero_to_fp32\.py\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        tag = deepspeed_tag(folder)
        if tag is not None:
            judge_deepspeed(folder, tag, expected, report)
            return
        judge_index(folder, "", report)
        if "meta.pt" not in folder.files:
            report.torn.append("`meta.pt` is missing")
        else:
            report.torn += opened(folder, ["meta.pt"])


class Nanotron(Form):
    """nanotron's `checkpoints/N/` (nanotron/serialize/): every `…-R-of-N…` file in `model/`,
    `optimizer/` and `random/`, the scheduler, and `checkpoint_metadata.json`, which is written
    last.
    """

    name = "nanotron"
    marks = re.compile(
        r"checkpoint_metadata\.json\Z|optimizer/optimizer_.*-of-.*\.pt\Z|optimizer/.*"
    )
    writes = re.compile(
        r"checkpoint_metadata\.json\Z|(?:model|optimizer|lr_scheduler|random)/.*"
        r"|(?:model_)?config\.(?:json|yaml)\Z"
    )
    _OF = re.compile(r"(\d+)-of-(\d+)")
    _PARSED = ("checkpoint_metadata.json", "optimizer/optimizer_config.json")
    _LOADED = re.compile(r"(?:model|optimizer|lr_scheduler|random)/.*\.(?:safetensors|pt|json)\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        if "checkpoint_metadata.json" not in folder.files:
            report.torn.append("`checkpoint_metadata.json`, which is written last, is missing")
        needed = ("model/", "optimizer/", "lr_scheduler/", "optimizer/optimizer_config.json")
        lost = [name for name in needed if not any(file.startswith(name) for file in folder.files)]
        self.lacking(folder, report, ["`{}` is missing".format(name) for name in lost])
        report.torn += json_faults(folder, self._PARSED) + whole_files(folder)
        for names in self._families(folder).values():
            report.torn += self._lost(names)[:3]
        report.torn += self._parameters(folder)
        before = {shape_of(name) for name in folder.previous if self._LOADED.match(name)}
        gone = sorted(before - {shape_of(name) for name in folder.files})
        report.torn += [
            "`{}`, as in the one beside it, is missing".format(name) for name in gone[:3]
        ]

    def _families(self, folder: Folder) -> Dict[str, List[str]]:
        families: Dict[str, List[str]] = {}
        for name in folder.files:
            if self._OF.search(name):
                families.setdefault(self._OF.sub(r"*-of-\2", name), []).append(name)
        return families

    def _parameters(self, folder: Folder) -> List[str]:
        """The weights that the optimizer's configuration names: with ZeRO 1 it lists every
        parameter."""
        found = read_json(folder, "optimizer/optimizer_config.json") or {}
        configs = found.get("configs")
        shapes = configs.get("orig_param_shapes") if isinstance(configs, dict) else None
        there = {os.path.dirname(name) for name in folder.files}
        wanted = [
            "model/" + str(key).rpartition(".")[0].replace(".", "/")
            for key in (shapes if isinstance(shapes, dict) else ())
        ]
        return missing("parameters", sorted(set(wanted)), there, str)

    def _lost(self, names: List[str]) -> List[str]:
        sizes = [int(size) for _, size in self._OF.findall(names[0])]
        there = {tuple(int(rank) for rank, _ in self._OF.findall(name)) for name in names}
        wanted: List[Tuple[int, ...]] = [()]
        for size in sizes:
            wanted = [(*key, rank) for key in wanted for rank in range(size)]
        shape = self._OF.sub(r"{}-of-\2", names[0])
        return missing("files", wanted, there, shape.format)


class SingleFile(Form):
    """One file that `torch.save`, safetensors or numpy wrote: whole by the mark at its end or the
    length in its header. The step is read where it is kept under a usual name."""

    name = "single file"
    marks = re.compile(r"(?!)")
    writes = re.compile(r".*\.(?:pt|pth|ckpt|bin|tar|pkl|safetensors|npz)\Z")
    KEYS = ("global_step", "step", "iteration", "iter", "global_steps")

    def could_be(self, folder: Folder) -> bool:
        """Whether nothing but such files lies there, in no folders: a folder of checkpoints is
        none."""
        names = list(folder.files)
        return bool(names) and all(self.writes.match(name) and "/" not in name for name in names)

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        report.torn += opened(folder, folder.files)
        for name in sorted(folder.files) if not report.torn else ():
            values = shards.top_values(os.path.join(folder.path, name), self.KEYS)
            steps = [value for value in values.values() if isinstance(value, int)]
            if steps and report.iteration is None:
                report.iteration = steps[0]
