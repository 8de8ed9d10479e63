"""DeepSpeed's checkpoint layout, as GPT-NeoX, Megatron-DeepSpeed and plain DeepSpeed trainers write it."""

import os
import re
from typing import Any, Dict, List, Optional, Set, Tuple

from . import shards
from .layout import Expected, Folder, Layout, implausible, missing, opened

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt\Z")
_ZERO_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt\Z")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt\Z")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt\Z")


class DeepSpeed(Layout):
    """`global_stepN/` with `latest` beside it.

    Complete when all of these lie in the folder, and every one of them opens (deepspeed/runtime/engine.py
    `_get_ckpt_name`, `_get_zero_ckpt_name`; pipe/module.py `ckpt_layer_path`; listings of real runs):

    - ZeRO 0 to 2: one `mp_rank_XX_model_states.pt` for each model-parallel rank (tensor x pipeline);
    - ZeRO 1 and 2: one `[bf16_]zero_pp_rank_D_mp_rank_XX_optim_states.pt` for each data-parallel rank of each of those;
    - ZeRO 3: one `zero_pp_rank_D_mp_rank_XX_model_states.pt` and one `…_optim_states.pt` for each of those;
    - with pipeline stages (NeoX: `pipe_parallel_size` >= 1), the same `layer_II-model_TT` files for every tensor rank.

    How many ranks there were is read from the checkpoint itself (`dp_world_size`, `mp_world_size` in a model file), then
    from the plan, then from the file names, which must then be without gaps. `latest` is not asked: rank 0 writes it
    before the other ranks are done (engine.py:3316-3319), and truncates it first.
    """

    name = "deepspeed"
    pattern = re.compile(r"(?:global_step|start-)(\d+)\Z", re.ASCII)
    tracker = "latest"
    by_link = True

    def folder_name(self, number: int) -> str:
        return "global_step{}".format(number)

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        model = {key[0]: name for key, name in folder.matching(_MODEL).items()}
        zero_model, optim = _by_rank(folder, _ZERO_MODEL), _by_rank(folder, _OPTIM)
        layers = {(key[0], key[1]): name for key, name in folder.matching(_LAYER).items()}
        if not model and not zero_model:
            faults.append("no model states in it")
            return
        names = [*model.values(), *zero_model.values(), *optim.values(), *layers.values()]
        faults += opened(folder, names)
        faults += implausible(folder, _kinds(model, zero_model, optim, layers))
        # A file that opens says how many ranks wrote the checkpoint; one that does not is a fault already.
        said = {} if faults else _said(folder, (model or zero_model))
        num_mp = self._model_ranks(expected, said, {*model, *(mp for _, mp in zero_model), *(mp for _, mp in optim)},
                                   faults, mismatches)  # fmt: skip
        stage = _stage(expected, said, zero_model, optim)
        num_dp = self._data_ranks(expected, said, {dp for dp, _ in [*zero_model, *optim]}, stage, faults, mismatches)
        pairs = [(dp, mp) for mp in range(num_mp) for dp in range(num_dp)]
        if stage == 3:
            faults += missing(
                "model shards", pairs, set(zero_model), "zero_pp_rank_{}_mp_rank_{:02d}_model_states.pt".format
            )
        else:
            faults += missing("model shards", range(num_mp), set(model), "mp_rank_{:02d}_model_states.pt".format)
        if stage or optim:
            prefix = "bf16_" if any(name.startswith("bf16_") for name in optim.values()) else ""
            faults += missing("optimizer shards", pairs, set(optim),
                              (prefix + "zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt").format)  # fmt: skip
        faults += self._layer_faults(expected, layers, folder)

    @staticmethod
    def _model_ranks(
        expected: Expected, said: Dict[str, Any], found: Set[int], faults: List[str], mismatches: List[str]
    ) -> int:
        planned = None
        if expected.tensor_parallel and (expected.pipeline_parallel is not None or said.get("mp_world_size") is None):
            planned = expected.tensor_parallel * max(expected.pipeline_parallel or 1, 1)
        return _count("model-parallel", planned, said.get("mp_world_size"), found, faults, mismatches)

    @staticmethod
    def _data_ranks(
        expected: Expected, said: Dict[str, Any], found: Set[int], stage: int, faults: List[str], mismatches: List[str]
    ) -> int:
        planned = expected.data_parallel if stage else None
        # Without ZeRO only bf16 optimizers are sharded, and the world size in the file says nothing about files.
        told = said.get("dp_world_size") if stage or found else None
        return _count("data-parallel", planned, told, found, faults, mismatches)

    @staticmethod
    def _layer_faults(expected: Expected, layers: Dict[Tuple[int, int], str], folder: Folder) -> List[str]:
        if not layers:
            return ["no layer files, and the plan has pipeline stages"] if expected.pipeline_parallel else []
        tensor = {rank for _, rank in layers}
        ranks = range(max([*tensor, (expected.tensor_parallel or 1) - 1]) + 1)
        numbers = {layer for layer, _ in layers}
        before = {int(match.group(1)) for match in map(_LAYER.match, folder.previous) if match}
        wanted = [(layer, rank) for layer in sorted(numbers | before) for rank in ranks]
        return missing("layer files", wanted, set(layers), "layer_{:02d}-model_{:02d}-model_states.pt".format)


def _by_rank(folder: Folder, pattern: Any) -> Dict[Tuple[int, int], str]:
    return {(key[0], key[1]): name for key, name in folder.matching(pattern).items()}


def _kinds(
    model: Dict[int, str], zero_model: Dict[Any, str], optim: Dict[Any, str], layers: Dict[Any, str]
) -> List[List[str]]:
    by_layer: Dict[int, List[str]] = {}
    for (layer, _), name in layers.items():
        by_layer.setdefault(layer, []).append(name)
    # With pipeline stages the mp_rank files of different stages hold different things: only the past compares.
    by_file = [[name] for name in model.values()] if layers else [list(model.values())]
    return [*by_file, list(zero_model.values()), list(optim.values()), *by_layer.values()]


def _said(folder: Folder, model: Dict[Any, str]) -> Dict[str, Any]:
    first = model[min(model)]
    found = shards.top_values(os.path.join(folder.path, first), ("dp_world_size", "mp_world_size", "ds_config"))
    ranks = {key: found[key] for key in ("dp_world_size", "mp_world_size") if _is_count(found.get(key))}
    config = found.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if isinstance(zero, dict) and zero.get("stage") in (0, 1, 2, 3):
        ranks["stage"] = zero["stage"]
    return ranks


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6


def _stage(expected: Expected, said: Dict[str, Any], zero_model: Dict[Any, str], optim: Dict[Any, str]) -> int:
    if "stage" in said:
        return int(said["stage"])
    if expected.zero_stage is not None:
        return expected.zero_stage
    return 3 if zero_model else 1 if optim else 0


def _count(
    what: str, planned: Optional[int], said: Optional[int], found: Set[int], faults: List[str], mismatches: List[str]
) -> int:
    """How many ranks there must be: as the file says, else as planned, else as the names show."""
    if said is not None:
        if planned is not None and planned != said:
            mismatches.append("was saved by {} {} ranks, the plan has {}".format(said, what, planned))
        return said
    seen = max(found) + 1 if found else 1
    if planned is not None and seen > planned:
        mismatches.append("was saved by {} {} ranks, the plan has {}".format(seen, what, planned))
        return seen
    return planned if planned is not None else seen
