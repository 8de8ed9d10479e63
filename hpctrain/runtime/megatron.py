"""How Megatron-LM, Megatron-Bridge and NeMo write a checkpoint."""

import os
import re
from typing import Any, Dict, List, Optional, Tuple

from . import shards
from .dcp import judge_index
from .files import read_text
from .layout import (
    MAX_TEXT_BYTES,
    Expected,
    Folder,
    Form,
    Report,
    json_faults,
    missing,
    opened,
    read_json,
)

_ARGUMENTS = (
    ("tensor_model_parallel_size", "tensor_parallel", "tensor-parallel"),
    ("pipeline_model_parallel_size", "pipeline_parallel", "pipeline"),
    ("expert_model_parallel_size", "expert_parallel", "expert-parallel"),
)
_MOST_FILES_READ = 64


class Shape:
    """How many tensor, pipeline and expert ranks wrote a checkpoint, None where nothing says so."""

    def __init__(self, arguments: Any) -> None:
        values = getattr(arguments, "__dict__", {})
        self.sizes: Dict[str, Optional[int]] = {}
        for argument, key, _ in _ARGUMENTS:
            value = values.get(argument)
            self.sizes[key] = value if isinstance(value, int) and value > 0 else None
        sharded = values.get("use_distributed_optimizer")
        self.distributed_optimizer = sharded is True and values.get("no_save_optim") is not True


class MegatronLegacy(Form):
    """`--ckpt-format torch`: a `model_optim_rng.pt` (or `model_rng.pt`) for every rank, in
    `mp_rank_TT[_PPP][_EEE]/` (megatron/training/checkpointing.py `get_checkpoint_name`): `_PPP`
    with pipeline stages, `_EEE` with expert ranks.

    The sizes are those in the arguments that each file holds, else the plan's, else the names must
    be without gaps.
    """

    name = "Megatron legacy"
    marks = re.compile(
        r"mp_rank_\d+(?:_\d+){0,2}/"
        r"(?:model_optim_rng|model_rng|distrib_optim|optim|weights_and_optimizer)\.pt\Z"
    )
    writes = marks
    _RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?/(?:model_optim_rng|model_rng)\.pt\Z")
    _OPTIM = re.compile(r"(mp_rank_[\d_]+)/distrib_optim\.pt\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        ranks = folder.matching(self._RANK)
        if not ranks:
            self.lacking(folder, report, ["its model states are missing"])
            return
        report.torn += opened(folder, [name for name in folder.files if self.marks.match(name)])
        if not report.torn:
            report.torn += _several_steps(folder, sorted(ranks.values()))
        first = ranks[min(ranks)]
        said = shards.top_values(os.path.join(folder.path, first), ("args", "iteration"))
        step = said.get("iteration")
        report.iteration = step if isinstance(step, int) else None
        shape = Shape(said.get("args"))
        report.torn += _missing_ranks(ranks, shape, expected)
        _compare(shape, expected, report)
        with_optimizer = {m.group(1) for m in map(self._OPTIM.match, folder.files) if m}
        if with_optimizer or shape.distributed_optimizer:
            wanted = sorted(name.split("/")[0] for name in ranks.values())
            form = "{}/distrib_optim.pt"
            report.torn += missing("optimizer files", wanted, with_optimizer, form.format)


def _missing_ranks(
    ranks: Dict[Tuple[int, ...], str], shape: Shape, expected: Expected
) -> List[str]:
    """The product of the sizes, or, where they are not known, no gap in the numbers."""
    width = max(len(key) for key in ranks)
    seen = [max(key[place] for key in ranks if len(key) == width) + 1 for place in range(width)]
    known = [shape.sizes[key] or getattr(expected, key) for _, key, _ in _ARGUMENTS]
    sizes = [known[0] or seen[0]]
    if width == 2:
        # Either pipeline stages or expert ranks: whichever there are more than one of.
        other = known[1] if (known[1] or 1) > 1 else known[2]
        sizes.append(max(other or 1, seen[1]))
    elif width == 3:
        sizes += [known[1] or seen[1], known[2] or seen[2]]
    wanted: List[Tuple[int, ...]] = [()]
    for size in sizes:
        wanted = [(*key, rank) for key in wanted for rank in range(size)]
    form = "mp_rank_{:02d}" + "_{:03d}" * (width - 1) + "/model_optim_rng.pt"
    return missing("model files", wanted, ranks, form.format)


def _compare(shape: Shape, expected: Expected, report: Report) -> None:
    for _, key, words in _ARGUMENTS:
        saved, planned = shape.sizes[key], getattr(expected, key)
        if saved is not None and planned and saved != planned:
            line = "was saved by {} {} ranks, the plan has {}"
            report.refuse(line.format(saved, words, planned))


def _several_steps(folder: Folder, names: List[str]) -> List[str]:
    steps: Dict[int, str] = {}
    every = max(1, len(names) // _MOST_FILES_READ)
    for name in names[::every]:
        path = os.path.join(folder.path, name)
        step = shards.top_values(path, ("iteration",)).get("iteration")
        if isinstance(step, int):
            steps.setdefault(step, name)
    if len(steps) < 2:
        return []
    shown = ", ".join("`{}` of {}".format(name, step) for step, name in sorted(steps.items())[:3])
    return ["its files are of several iterations: " + shown]


class MegatronDist(Form):
    """`--ckpt-format torch_dist`, Megatron-Bridge and NeMo 2 (there in `weights/`): `.metadata` and
    the `.distcp` files it names, `common.pt`, and `metadata.json`, which is written last
    (megatron/core/dist_checkpointing/serialization.py `save`)."""

    name = "Megatron torch_dist"
    marks = re.compile(r"(?:weights/)?(?:metadata\.json|common\.pt)\Z")
    writes = re.compile(
        marks.pattern + r"|(?:weights/)?(?:(?:__\d+)?\.metadata|.*\.distcp)\Z"
        r"|context/.*|run_config\.yaml\Z|train_state\.pt\Z|tokenizer/.*|modelopt_.*"
    )

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        where = "weights" if "weights" in folder.folders() else ""
        part = folder.below(where) if where else folder
        prefix = where + "/" if where else ""
        backend = (read_json(part, "metadata.json") or {}).get("sharded_backend", "torch_dist")
        if backend != "torch_dist":
            report.unknown.append("there is no rule for Megatron's `{}`".format(backend))
            return
        for name in ("metadata.json", "common.pt"):
            if name not in part.files:
                report.torn.append("`{}{}` is missing".format(prefix, name))
            elif part.files[name].size <= 0:
                report.torn.append("`{}{}` is empty".format(prefix, name))
        if "metadata.json" in part.files and part.files["metadata.json"].size > 0:
            report.torn += json_faults(part, ["metadata.json"], prefix)
        judge_index(folder, where, report)
        if "common.pt" in part.files and part.files["common.pt"].size > 0:
            report.torn += opened(folder, [prefix + "common.pt"])
        self._bridge(folder, report)
        common = shards.top_values(os.path.join(part.path, "common.pt"), ("args", "iteration"))
        step = common.get("iteration")
        report.iteration = step if isinstance(step, int) else None

    @staticmethod
    def _bridge(folder: Folder, report: Report) -> None:
        """Megatron-Bridge adds `train_state.pt` and `run_config.yaml`; both or none, or as
        before."""
        own = ("train_state.pt", "run_config.yaml")
        there = [name for name in own if name in folder.files or name in folder.previous]
        if there:
            faults = ["`{}` is missing".format(name) for name in own if name not in folder.files]
            report.torn += faults
        report.torn += opened(folder, [name for name in own[:1] if name in folder.files])
        if "run_config.yaml" in folder.files:
            text = read_text(os.path.join(folder.path, "run_config.yaml"), MAX_TEXT_BYTES) or ""
            if not _may_be_yaml(text):
                report.torn.append("`run_config.yaml` is cut short")


def _may_be_yaml(text: str) -> bool:
    """Whether a mapping may end like that: with a whole line, or in one that says what a key is and
    closes what it opens. Nothing of YAML is read on batch hosts."""
    if not text.strip() or "\0" in text:
        return False
    last = text.rsplit("\n", 1)[-1]
    if not last.strip():
        return True
    closed = last.count("{") == last.count("}") and last.count("[") == last.count("]")
    return closed and bool(re.search(r":(?:\s|\Z)|\A\s*-|[}\]]\s*\Z", last))


class TorchDcp(Form):
    """Megatron's `torch_dcp` and `fsdp_dtensor`: a plain distributed checkpoint without `common.pt`
    and `metadata.json` (checkpointing.py `_get_checkpoint_format`). Where the checkpoint before had
    them these two are missing."""

    name = "Megatron torch_dcp"
    marks = re.compile(r"(?:__\d+)?\.metadata\Z|.*\.distcp\Z")
    writes = re.compile(marks.pattern + r"|run_config\.yaml\Z|train_state\.pt\Z|tokenizer/.*")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        judge_index(folder, "", report)
        needed = [name for name in ("metadata.json", "common.pt") if name in folder.previous]
        report.torn += ["`{}` is missing".format(name) for name in needed]
        MegatronDist._bridge(folder, report)
