"""GPU memory of an open-instruct run: its arguments as the layout that `recipes.memory` reckons
with."""

from __future__ import annotations

from hpctrain.recipes.memory import Change, Layout, judge
from hpctrain.recipes.open_instruct.data import Model
from hpctrain.recipes.open_instruct.draft import DPO, Draft
from hpctrain.recipes.pace import pace
from hpctrain.recipes.trainer_config import shape_at, usual_changes
from hpctrain.runtime import hubcache


def decide(draft: Draft, model: Model, sharding: str, hf_home: str | None) -> None:
    """Adds what does not fit to the draft's problems; nothing where the model's shape is not known,
    or a DeepSpeed configuration of the user's own may offload."""
    folder = model.folder
    if not folder and hf_home and model.name:
        revision = str(draft.get("model_revision") or "main")
        folder = hubcache.snapshot(hf_home, hubcache.Repo("model", model.name, revision))
    shape, length = shape_at(folder or model.name), draft.count("max_seq_length")
    micro = draft.count("per_device_train_batch_size") or 1
    own = draft.options["deepspeed_config"] or draft.options["mixed_precision"] == "no"
    paged = draft.get("dpo_use_paged_optimizer") is True
    if shape is None or length is None or own or paged:
        return
    rank = draft.count("lora_rank") or 64
    quantised = draft.get("use_qlora") is True
    frozen = quantised or draft.get("use_lora") is True
    update = 2 * rank * shape.layers * (2 * shape.hidden + shape.query + shape.key + 2 * shape.mlp)
    small = draft.get("use_8bit_optimizer") is True and quantised
    row = length * (2 if draft.program == DPO else 1)  # both replies of a pair pass at once
    layout = Layout(
        sharding if sharding != "none" else "one",
        micro * row,
        row,
        shards=draft.world_size if sharding != "none" else 1,
        gpus=draft.world_size,
        accumulates=(draft.count("gradient_accumulation_steps") or 1) > 1,
        masters=False,
        optimizer_bytes=2.1 if small else 0,
        adapters=update if frozen else None,
        base_bits=4 if quantised else 16,
        all_linears=True,
        checkpointing=draft.get("gradient_checkpointing") is True,
        loss="fused" if draft.get("use_liger_kernel") is True else "hf",
    )
    more = []
    if not frozen and draft.has("use_lora"):
        other = layout._replace(adapters=update)
        more.append(Change("`use_lora: true`", other))
    checkpointing = "gradient_checkpointing" if draft.has("gradient_checkpointing") else ""
    keys = ("per_device_train_batch_size", checkpointing)
    decisions, problems = judge(
        draft.context, shape, layout, model.where, usual_changes(layout, *keys, *more)
    )
    rows = micro * (draft.count("gradient_accumulation_steps") or 1) * draft.world_size
    paced = pace(draft.context, shape, layout, rows, draft.count("max_train_steps"))
    draft.decisions += [*decisions, *(paced if draft.program != DPO else ())]
    draft.problems += problems
