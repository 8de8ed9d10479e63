"""How transformers' Trainer, accelerate, open-instruct and exporters write a checkpoint."""

import os
import re
from typing import List, Optional, Pattern, Set, Tuple

from .dcp import judge_index, ranks_in
from .deepspeed import DeepSpeed
from .files import read_text
from .layout import Expected, Folder, Form, Report, json_faults, missing, opened, read_json
from .shards import top_values

CUT_SHORT = "is cut short"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model_fsdp.bin",
)
_ZIPS = (".pt", ".pth", ".bin", ".safetensors", ".pkl", ".ckpt")
_OF = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(safetensors|bin)\Z")
# What save_pretrained leaves beside the weights of any model, tokenizer, processor or adapter.
_DESCRIBES = (
    r"(?:[\w.-]*config|generation_config|tokenizer[\w.-]*|special_tokens_map|added_tokens|vocab"
    r"|chat_template[\w.-]*|preprocessor_config|processor_config|merges)"
    r"\.(?:json|txt|jinja|model)\Z"
    r"|tokenizer\.model\Z|spiece\.model\Z|[\w.-]*\.spm\Z|README\.md\Z|chat_template\.jinja\Z"
    r"|training_args\.bin\Z|.*\.(?:py|md|txt)\Z|additional_chat_templates/.*"
)
_MODEL_FILES = (
    r"(?:model|pytorch_model|adapter_model)(?:[_-]\d+(?:-of-\d+)?)?\.(?:safetensors|bin)\Z"
    r"|(?:model\.safetensors|pytorch_model\.bin)\.index\.json\Z"
)
_FSDP = r"(?:pytorch_model_fsdp|optimizer)_\d+/.*|pytorch_model_fsdp[\w]*\.bin\Z"


def weight_faults(folder: Folder) -> List[str]:
    """What is missing of a model's weight files, by their index or the numbers in their names."""
    top = folder.top()
    for index in _INDEXES:
        if index in top:
            found = read_json(folder, index)
            shards_of = found.get("weight_map") if found else None
            if not isinstance(shards_of, dict):
                return ["`{}` {}".format(index, CUT_SHORT)]
            return missing("weight files", sorted(set(map(str, shards_of.values()))), top, str)
    numbered = [match for match in map(_OF.match, sorted(top)) if match]
    if numbered:
        # Shards are never written without their index, which names what is in each.
        ending = (
            "model.safetensors" if numbered[0].group(4) == "safetensors" else "pytorch_model.bin"
        )
        return ["`{}.index.json` is missing".format(ending)]
    return [] if any(name in top for name in _WEIGHTS) else ["the weights are missing"]


def whole_files(folder: Folder, names: Optional[List[str]] = None) -> List[str]:
    """What is wrong with the archives among the files (`names`: those to look at)."""
    looked_at = names if names is not None else list(folder.files)
    return opened(folder, [name for name in looked_at if name.endswith(_ZIPS)])


def _all_numbered(folder: Folder) -> bool:
    """Whether the weight files are there by the numbers in their names, 1 to N of N."""
    matches = [match for match in map(_OF.match, folder.top()) if match]
    numbers = {int(match.group(2)) for match in matches}
    return bool(matches) and numbers == set(range(1, int(matches[0].group(3)) + 1))


class Weights(Form):
    """A model alone, as `save_pretrained` writes it: every file that its index names."""

    name = "Hugging Face model"
    marks = re.compile(_MODEL_FILES)
    writes = re.compile(_MODEL_FILES + "|" + _DESCRIBES)

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        faults = weight_faults(folder)
        report.torn += whole_files(folder, sorted(folder.top()))
        if any(fault.endswith(CUT_SHORT) for fault in faults) and _all_numbered(folder):
            report.unknown += (
                faults  # some readers ask the shards' own headers, and never the index
            )
        else:
            self.lacking(folder, report, faults)


class HfTrainer(Form):
    """`checkpoint-N` of transformers' Trainer and TRL (transformers/trainer.py `_save_checkpoint`,
    `_load_optimizer_and_scheduler`, `_load_rng_state`).

    Complete when `trainer_state.json`, which is written last, is of step N, the weights are whole,
    and nothing is missing that the Trainer would begin anew without a word: the optimizer and the
    scheduler (it loads both or none), the random state of each rank, the scaler where the
    checkpoint before has one. Under FSDP weights and optimizer are distributed checkpoints, under
    DeepSpeed shards in the folder that `latest` names. One that was saved without any of them on
    purpose (`save_only_model`) cannot be resumed, and is not damaged.
    """

    name = "Hugging Face Trainer"
    marks = re.compile(
        r"trainer_state\.json\Z|rng_state(?:_\d+)?\.pth\Z|optimizer\.pt\Z|scheduler\.pt\Z"
        r"|checkpoint-is-incomplete\.txt\Z"
    )
    writes = re.compile(
        "|".join(
            [
                marks.pattern,
                _MODEL_FILES,
                _DESCRIBES,
                _FSDP,
                r"scaler\.pt\Z|optimizer\.bin\Z|latest\Z",
            ]
        )
        + r"|(?:global_step|step)_?\d+/.*|zero_to_fp32\.py\Z|rank\d+-of-\d+-.*|scheduler\.bin\Z"
    )
    _RNG = re.compile(r"rng_state_(\d+)\.pth\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        top = folder.top()
        if "checkpoint-is-incomplete.txt" in top:
            report.torn.append("`checkpoint-is-incomplete.txt` marks it as interrupted")
        self._judge_state(folder, report)
        sharded = self._judge_sharded(folder, expected, report)
        # DeepSpeed loads its own shards, FSDP its own file, and nobody what describes the training.
        elsewhere = sharded == "deepspeed" or "pytorch_model_fsdp.bin" in top
        skipped = {"training_args.bin"} | ({"model.safetensors"} if elsewhere else set())
        report.torn += whole_files(folder, sorted(top - skipped))
        random_states = [name for name in top if name.startswith("rng_state")]
        has_scheduler = bool({"scheduler.pt", "scheduler.bin"} & top)
        has_optimizer = sharded or _any(top, r"optimizer(?:\.pt|\.bin)|rank\d+-of-.*optimizer")
        if not (random_states or has_scheduler or has_optimizer) and "trainer_state.json" in top:
            report.unknown.append(
                "it holds a model and no optimizer (`save_only_model`): no training can go on"
                " from it"
            )
            return
        lost = [] if has_optimizer else ["the optimizer's state is missing"]
        own_scheduler, num_ranks = False, ranks_of_parts(folder)
        if sharded == "deepspeed":
            own_scheduler, num_ranks = _said_by_deepspeed(folder)
        if not has_scheduler and not own_scheduler:
            lost.append("`scheduler.pt` is missing: the Trainer would begin the optimizer anew too")
        lost += self._random_faults(folder, random_states, num_ranks, report)
        if "scaler.pt" in folder.previous and "scaler.pt" not in top:
            lost.append("`scaler.pt` is missing")
        lost += self._weight_faults(folder, sharded)
        parsed = [] if sharded == "deepspeed" else ["config.json"]
        report.torn += json_faults(folder, parsed)
        self.lacking(folder, report, lost)

    @staticmethod
    def _weight_faults(folder: Folder, sharded: str) -> List[str]:
        """The weights that the Trainer loads: FSDP's own file where it saved whole states, which is
        told by the optimizer's name; nothing beside DeepSpeed's shards."""
        top = folder.top()
        if "optimizer.bin" in top:
            lacks = "pytorch_model_fsdp.bin" not in top
            return ["`pytorch_model_fsdp.bin`, the weights, is missing"] if lacks else []
        if sharded:
            return []
        return weight_faults(folder)

    @staticmethod
    def _judge_state(folder: Folder, report: Report) -> None:
        state = read_json(folder, "trainer_state.json")
        if state is None:
            report.torn.append(
                "`trainer_state.json`, which is written last, is missing or cut short"
            )
            return
        step = state.get("global_step")
        report.iteration = step if isinstance(step, int) else None
        name = re.search(r"checkpoint-(\d+)\Z", os.path.basename(folder.path))
        if name and step != int(name.group(1)) and not os.path.islink(folder.path):
            report.torn.append("`trainer_state.json` is of step {}".format(step))

    def _random_faults(
        self, folder: Folder, names: List[str], num_ranks: int, report: Report
    ) -> List[str]:
        if not names:
            return ["`rng_state.pth` is missing"]
        ranks = {key[0] for key in folder.matching(self._RNG)}
        if not ranks:
            return []
        fewer_ranks(folder, self._RNG, ranks, report)
        wanted = range(max(max(ranks) + 1, num_ranks))
        return missing("random states", wanted, ranks, "rng_state_{}.pth".format)

    @staticmethod
    def _judge_sharded(folder: Folder, expected: Expected, report: Report) -> str:
        """Judge FSDP's and DeepSpeed's parts; returns which of the two wrote them, "" for none."""
        folders = folder.folders()
        parts = [
            name
            for name in sorted(folders)
            if re.match(r"(pytorch_model_fsdp|optimizer)_\d+\Z", name)
        ]
        if parts or any("fsdp" in name for name in folder.top()):
            return judge_fsdp(folder, parts, report)
        tag = deepspeed_tag(folder)
        if tag is None:
            return ""
        if not (read_text(os.path.join(folder.path, "latest"), 4096) or "").strip():
            report.torn.append(
                "`latest`, without which DeepSpeed loads nothing, is missing or empty"
            )
        if tag not in folders:
            report.torn.append("`latest` names `{}`, which is not there".format(tag))
            return "deepspeed"
        judge_deepspeed(folder, tag, expected, report)
        return "deepspeed"


def judge_fsdp(folder: Folder, parts: List[str], report: Report) -> str:
    """The distributed checkpoints of FSDP in a Hugging Face checkpoint
    (accelerate/utils/fsdp_utils.py). Returns "fsdp" when the optimizer is among them."""
    for part in parts:
        judge_index(folder, part, report)
    if any(name.startswith("optimizer_") for name in parts):
        models = [name for name in parts if name.startswith("pytorch_model_fsdp_")]
        whole = "pytorch_model_fsdp.bin" in folder.top()
        if not models and not whole:
            report.torn.append("`pytorch_model_fsdp_0`, the weights, is missing")
        return "fsdp"
    if parts and "optimizer.bin" not in folder.top():
        report.torn.append("`optimizer_0`, the optimizer's state, is missing")
    return "fsdp" if parts else ""


def _said_by_deepspeed(folder: Folder) -> Tuple[bool, int]:
    """Whether DeepSpeed keeps the scheduler itself, by the configuration in a model file, and how
    many data-parallel ranks there were, 0 where nothing says it."""
    names = sorted(name for name in folder.files if name.endswith("model_states.pt"))
    if not names:
        return False, 0
    said = top_values(os.path.join(folder.path, names[0]), ("ds_config", "dp_world_size"))
    config, ranks = said.get("ds_config"), said.get("dp_world_size")
    own = isinstance(config, dict) and bool(config.get("scheduler"))
    return own, ranks if isinstance(ranks, int) else 0


def deepspeed_tag(folder: Folder) -> Optional[str]:
    """The sub-folder with DeepSpeed's shards, None where there are none."""
    named = (
        read_text(os.path.join(folder.path, "latest"), 4096) if "latest" in folder.files else None
    )
    shards = {
        name.split("/")[0]
        for name in folder.files
        if name.endswith(("_states.pt",)) and "/" in name
    }
    if named and named.strip() and "/" not in named:
        return named.strip()
    return min(shards) if shards else None


def judge_deepspeed(folder: Folder, tag: str, expected: Expected, report: Report) -> None:
    """DeepSpeed's shards in a checkpoint of another writer: the plan's sizes are not theirs."""
    part = folder.below(tag)
    inner = Expected(data_parallel=expected.data_parallel, zero_stage=expected.zero_stage)
    found = Report()
    DeepSpeed().judge(part, inner, found)
    report.torn += [fault.replace("`", "`{}/".format(tag), 1) for fault in found.torn]
    report.unknown += found.unknown
    report.mismatches += found.mismatches
    report.refusals += found.refusals


def ranks_of_parts(folder: Folder) -> int:
    """How many ranks FSDP's parts show at least."""
    parts = [
        name for name in folder.files if re.match(r"(?:pytorch_model_fsdp|optimizer)_\d+/", name)
    ]
    return ranks_in(name.split("/", 1)[1] for name in parts)


def fewer_ranks(folder: Folder, pattern: Pattern[str], ranks: Set[int], report: Report) -> None:
    """Nothing in such a checkpoint says how many ranks there were: with fewer than in the one
    before, the run may have got smaller, or the last ranks' files were never written."""
    before = {int(match.group(1)) for match in map(pattern.match, folder.previous) if match}
    if before and ranks and len(ranks) < len(before):
        line = "it has random states of {} ranks, the one before of {}"
        report.unknown.append(line.format(len(ranks), len(before)))


class Accelerate(Form):
    """accelerate's `save_state` (accelerate/checkpointing.py `save_accelerator_state`): the weights
    and optimizers, then `random_states_R.pkl` by every rank, without a gap."""

    name = "accelerate"
    marks = re.compile(
        r"random_states_\d+\.pkl\Z|custom_checkpoint_\d+\.pkl\Z|optimizer(?:_\d+)?\.bin\Z"
        r"|scheduler(?:_\d+)?\.bin\Z|sampler(?:_\d+)?\.bin\Z|dl_state_dict(?:_\d+)?\.bin\Z"
        r"|COMPLETED\Z"
    )
    writes = re.compile(
        "|".join([marks.pattern, _MODEL_FILES, _DESCRIBES, _FSDP, r"scaler\.pt\Z"])
        + r"|pytorch_model(?:_\d+)?/.*|zero_to_fp32\.py\Z|latest\Z"
    )
    marker: Optional[str] = None
    _RANDOM: Pattern[str] = re.compile(r"random_states_(\d+)\.pkl\Z")
    _SHARDED = re.compile(r"(?:pytorch_model_fsdp|optimizer)_\d+\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        top, folders = folder.top(), folder.folders()
        if self.marker and self.marker not in top:
            report.torn.append("`{}` is missing".format(self.marker))
        ranks = {key[0] for key in folder.matching(self._RANDOM)}
        least = max([1, ranks_of_parts(folder), *(rank + 1 for rank in ranks)])
        report.torn += missing("random states", range(least), ranks, "random_states_{}.pkl".format)
        fewer_ranks(folder, self._RANDOM, ranks, report)
        report.torn += whole_files(folder, sorted(top))
        before = [one for one in folder.previous if "/" not in one and Accelerate.marks.match(one)]
        report.torn += [
            "`{}` is missing".format(name)
            for name in sorted(before)
            if name not in top and not self._RANDOM.match(name)
        ]
        if "pytorch_model" in folders:
            inner = Expected(
                data_parallel=expected.data_parallel or len(ranks) or None,
                zero_stage=expected.zero_stage,
            )
            judge_deepspeed(folder, "pytorch_model", inner, report)
            return
        parts = [name for name in sorted(folders) if self._SHARDED.match(name)]
        if parts or "pytorch_model_fsdp.bin" in top:
            judge_fsdp(folder, parts, report)
            return
        self.lacking(folder, report, weight_faults(folder))
        if not _any(top, r"optimizer(?:_\d+)?\.bin"):
            # Random states are written last: with them there, it may have been saved without one.
            said = report.unknown if ranks and not report.torn else report.torn
            said.append("the optimizer's state is missing")


class OpenInstruct(Accelerate):
    """open-instruct's `step_N` and `epoch_N`: accelerate's, and `COMPLETED`, which its
    `get_last_checkpoint` asks for (open_instruct/utils.py). The marker alone proves nothing: it is
    written into the greatest folder, which after a crash is not the one that was saved."""

    name = "open-instruct"
    marker = "COMPLETED"

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        super().judge(folder, expected, report)
        # Its runs always have an optimizer: without one the save was cut off.
        report.torn += report.unknown
        report.unknown = []


class Completed(OpenInstruct):
    """open-instruct's, told from accelerate's by the marker alone: for a folder of no known
    layout."""

    marks = re.compile(r"COMPLETED\Z")


def _any(names: Set[str], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in names)
