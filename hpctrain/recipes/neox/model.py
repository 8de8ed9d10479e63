"""The model's shape, precision, optimizer and clipping: what NeoX asserts at start-up, and where it
silently does less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpctrain.config.fields import nearest
from hpctrain.recipes.neox.batch import Shape
from hpctrain.recipes.neox.draft import RUN, Draft
from hpctrain.recipes.rules import Rule, is_number

REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "seq_length",
)
_OPTIMIZER_LR = 0.001  # OPT_PARAMS_DEFAULTS of NeoX megatron/neox_arguments/deepspeed_args.py
# Recomputed from other keys at start-up (arguments.py:940-1075), so that what is written under
# these names is lost.
_RECOMPUTED = {
    "lr": "optimizer.params.lr",
    "optimizer_type": "optimizer.type",
    "zero_stage": "zero_optimization.stage",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "batch_size": "train_micro_batch_size_per_gpu",
    "dynamic_loss_scale": "loss_scale",
    "is_pipe_parallel": "pipe_parallel_size",
}
_ATTENTION = (
    "global",
    "local",
    "sparse_fixed",
    "sparse_variable",
    "bigbird",
    "bslongformer",
    "gmlp",
    "amlp",
    "flash",
    "rwkv",
    "mamba",
)
_OPTIMIZERS = (
    "adam",
    "onebitadam",
    "cpu_adam",
    "cpu_torch_adam",
    "sm3",
    "madgrad_wd",
    "sgd",
    "lion",
)


def check_model(draft: Draft, shape: Shape) -> None:
    """Shape of the model against itself and against the ranks."""
    for name in REQUIRED:
        number = draft.number(name)
        if draft.missing(name):
            draft.error(
                f"`{name}` is missing",
                name,
                why="NeoX has no default for it",
                hint="name a `base_config`, or set it under `config:`",
            )
        elif number is not None and number < 1:
            draft.error(f"`{name}: {number}` must be at least 1", name)
            draft.values.pop(name)
    layers, hidden, heads = (
        draft.number(name) for name in ("num_layers", "hidden_size", "num_attention_heads")
    )
    kv_heads, tensor = draft.number("num_kv_heads"), shape.tensor
    types = _attention_types(draft, layers)
    draft.check(
        Rule(
            hidden and heads and hidden % heads and "mamba" not in types,
            f"`hidden_size: {hidden}` is no multiple of `num_attention_heads: {heads}`",
            "hidden_size",
        )
    )
    for name, number in (("num_attention_heads", heads), ("hidden_size", hidden)):
        draft.check(
            Rule(
                number and number % tensor,
                f"`{name}: {number}` is no multiple of `model_parallel_size: {tensor}`",
                name,
                why="tensor parallelism splits it evenly",
                hint=_divisor_hint(number or 0, tensor),
            )
        )
    if kv_heads is not None and heads:
        draft.check(
            (
                Rule(
                    kv_heads < 1 or heads % kv_heads,
                    f"`num_kv_heads: {kv_heads}` does not divide `num_attention_heads: {heads}`",
                    "num_kv_heads",
                ),
                Rule(
                    kv_heads < heads and kv_heads % tensor,
                    f"`num_kv_heads: {kv_heads}` is no multiple of `model_parallel_size: {tensor}`",
                    "num_kv_heads",
                    why="NeoX needs at least one key-value head on each rank",
                    hint=_divisor_hint(kv_heads, tensor),
                ),
            ),
            Rule(
                kv_heads < heads and types - {"flash", "global"},
                "grouped-query attention works with flash and global attention only",
                "attention_config",
            ),
            Rule(
                kv_heads < heads and draft.values.get("sparsity_config"),
                "`sparsity_config` does not work with grouped-query attention",
                "sparsity_config",
            ),
        )
    length, longest = draft.number("seq_length"), draft.number("max_position_embeddings")
    unique = draft.number("num_unique_layers")
    draft.check(
        (
            Rule(
                layers and shape.pipeline > layers,
                f"`pipe_parallel_size: {shape.pipeline}` is more than `num_layers: {layers}`",
                "pipe_parallel_size",
            ),
            Rule(
                layers and layers % shape.stages,
                f"`num_layers: {layers}` is no multiple of `pipe_parallel_size: {shape.pipeline}`",
                "pipe_parallel_size",
                why="the stages get different numbers of layers, and all wait for the slowest",
                level="warning",
            ),
        ),
        Rule(
            length and longest and length > longest,
            f"`seq_length: {length}` is more than `max_position_embeddings: {longest}`",
            "seq_length",
            hint="the checkpoint fixes `max_position_embeddings`; shorten the sequences",
        ),
        Rule(
            unique is not None and layers and (unique < 1 or unique > layers or layers % unique),
            f"`num_unique_layers: {unique}` does not divide `num_layers: {layers}`",
            "num_unique_layers",
        ),
    )
    if (draft.number("moe_num_experts") or 1) > 1:
        _check_experts(draft, shape)


def check_precision(draft: Draft, shape: Shape) -> int:
    """Precision and ZeRO. Returns the ZeRO stage (NeoX's default is 0)."""
    precision = str(draft.get("precision") or "").lower()
    zero = draft.values.get("zero_optimization")
    stage: Any = 0
    if zero is not None:
        stage = zero.get("stage")
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            draft.error(
                "`zero_optimization` needs a `stage` of 0, 1, 2 or 3",
                ("zero_optimization", "stage"),
                why="NeoX stops without one",
            )
            stage = 0
    elif precision == "bfloat16" and draft.missing("zero_optimization"):
        draft.error(
            "`precision: bfloat16` needs `zero_optimization`",
            "precision",
            why="NeoX reads its stage and stops with a TypeError (arguments.py:999)",
            hint="set `zero_optimization` with `stage: 1`",
        )
    for name in ("fp16", "amp", "flops_profiler"):
        switch = draft.values.get(name)
        draft.check(
            Rule(
                isinstance(switch, dict)
                and "enabled" not in switch
                and not (name == precision == "fp16"),
                f"`{name}` needs `enabled`",
                name,
                why="NeoX stops without it",
                hint="enabled: true, or false",
            )
        )
    for name, own in (("fp16", "fp16"), ("bf16", "bfloat16")):
        table = draft.values.get(name)
        draft.check(
            Rule(
                isinstance(table, dict) and table.get("enabled") and precision not in ("", own),
                f"`{name}: {{enabled: true}}` contradicts `precision: {precision}`",
                name,
            )
        )
    tables = [draft.values.get(name) for name in ("fp16", "bf16")]
    data_types = draft.values.get("data_types")
    fp32_grads = isinstance(data_types, dict) and data_types.get("grad_accum_dtype") == "fp32"
    draft.check(
        Rule(
            all(isinstance(table, dict) and table.get("enabled") for table in tables),
            "`fp16` and `bf16` are both enabled",
            "bf16",
            why="DeepSpeed stops: it trains in one of them",
            hint="bf16: {enabled: true} and no fp16 on GPUs that have it",
        ),
        Rule(
            draft.get("fp16_lm_cross_entropy") and precision != "fp16",
            "`fp16_lm_cross_entropy` works with `precision: fp16` only",
            "fp16_lm_cross_entropy",
        ),
        Rule(
            shape.pipeline >= 1 and stage >= 2,
            f"ZeRO stage {stage} does not work with `pipe_parallel_size: {shape.pipeline}`",
            ("zero_optimization", "stage"),
            why="DeepSpeed's pipeline engine refuses stages 2 and 3",
            hint="stage 1, or `pipe_parallel_size: 0`",
        ),
        Rule(
            precision == "bfloat16" and stage and shape.pipeline >= 1 and not fp32_grads,
            "bfloat16 with ZeRO and pipeline parallelism needs gradients in fp32",
            "precision",
            why="NeoX warns that it breaks otherwise (DeepSpeed issue 1835)",
            hint="data_types: {grad_accum_dtype: fp32}",
            level="warning",
        ),
    )
    return int(stage)


def check_optimizer(draft: Draft) -> None:
    """Learning rate and optimizer; keys that NeoX recomputes are taken out, or refused where the
    run sets them."""
    for name, wins in _RECOMPUTED.items():
        if not draft.given(name):
            continue
        draft.check(
            Rule(
                draft.layer(name) == RUN,
                f"`{name}` has no effect: NeoX overwrites it from `{wins}`",
                name,
                hint=f"set `{wins}`",
            )
        )
        draft.drop(name, f"NeoX overwrites it from `{wins}`")
    optimizer = draft.values.get("optimizer")
    rate: Any = _OPTIMIZER_LR
    if optimizer is None:
        draft.check(
            Rule(
                draft.missing("optimizer"),
                "`optimizer` is missing, so NeoX trains with Adam at a learning rate of"
                f" {_OPTIMIZER_LR}",
                "optimizer",
                hint="optimizer:"
                " {type: Adam, params: {lr: 8.0e-6, betas: [0.9, 0.95], eps: 1.0e-8}}",
                level="warning",
            )
        )
    elif not isinstance(optimizer.get("params"), dict):
        draft.error(
            "`optimizer` needs `params`",
            "optimizer",
            why="NeoX stops with a KeyError",
            hint="params: {lr: 8.0e-6}",
        )
    else:
        if "type" not in optimizer:
            optimizer = {"type": "Adam", **optimizer}
            draft.put(
                "optimizer",
                optimizer,
                "NeoX stops at an optimizer without `type`, and Adam is its default",
            )
        kind = optimizer["type"]
        draft.check(
            Rule(
                not isinstance(kind, str) or kind.lower() not in _OPTIMIZERS,
                f"`optimizer.type: {kind}` is not one of NeoX's",
                ("optimizer", "type"),
                hint=nearest(str(kind), _OPTIMIZERS),
            )
        )
        for name, value in optimizer["params"].items():
            draft.check(
                Rule(
                    not all(
                        is_number(item) for item in (value if isinstance(value, list) else [value])
                    )
                    and name in ("lr", "eps", "betas", "weight_decay", "momentum"),
                    f"`optimizer.params.{name}: {value}` must be a number",
                    ("optimizer", "params", name),
                    hint="write it without quotes, with a dot",
                )
            )
        rate = optimizer["params"].get("lr")
        if rate is None:
            draft.warn(
                f"`optimizer.params.lr` is missing, so NeoX takes {_OPTIMIZER_LR}",
                ("optimizer", "params"),
                hint="lr: 8.0e-6",
            )
            rate = _OPTIMIZER_LR
    scheduler = draft.values.get("scheduler")
    draft.check(
        Rule(
            scheduler is not None
            and not (
                isinstance(scheduler.get("type"), str) and isinstance(scheduler.get("params"), dict)
            ),
            "`scheduler` needs a `type` and `params`",
            "scheduler",
            why="NeoX stops without",
            hint="delete it: NeoX has a schedule of its own (lr_decay_style, warmup)",
        )
    )
    lowest = draft.get("min_lr")
    if is_number(rate) and is_number(lowest) and lowest > rate:
        draft.error(
            f"`min_lr: {lowest:g}` is more than the learning rate {rate:g}",
            "min_lr",
            why=(
                f"`optimizer.params.lr` at {draft.where('optimizer', 'params', 'lr')}; NeoX stops"
                " with a ValueError"
            ),
            hint=f"`min_lr: {rate / 10:.1e}` or 0.0",
        )
    draft.check(
        Rule(
            draft.given("lr_decay_iters") and draft.given("lr_decay_fraction"),
            "`lr_decay_fraction` has no effect beside `lr_decay_iters`",
            "lr_decay_fraction",
            hint="delete one",
            level="warning",
        )
    )


def decide_clipping(draft: Draft) -> None:
    """Clipping that really clips.

    `clip_grad` is overwritten by `gradient_clipping` and read nowhere else (arguments.py:962).
    `gradient_clipping: 1.0` equals NeoX's default, is therefore left out of the DeepSpeed config
    (644-651), and DeeperSpeed's own default is 0.0, no clipping (DS runtime/constants.py:215);
    under `deepspeed_extra_args` it always arrives.
    """
    clip, gradient = draft.values.get("clip_grad"), draft.values.get("gradient_clipping")
    if clip is not None:
        clip_rules = draft.layer("clip_grad") == RUN and draft.layer("gradient_clipping") != RUN
        if (
            gradient is not None
            and clip != gradient
            and not clip_rules
            and draft.layer("clip_grad") == RUN
        ):
            draft.error(
                f"`clip_grad: {clip:g}` has no effect beside `gradient_clipping: {gradient:g}`",
                "clip_grad",
                why="NeoX overwrites it",
                hint="delete clip_grad",
            )
        elif gradient is None or (clip_rules and clip != gradient):
            draft.put(
                "gradient_clipping",
                clip,
                f"`clip_grad` at {draft.where('clip_grad')}, which NeoX itself ignores",
            )
        draft.drop("clip_grad", "NeoX overwrites it with `gradient_clipping`")
    if "gradient_clipping" in draft.broken:
        return
    value = draft.get("gradient_clipping")
    extra = dict(draft.values.get("deepspeed_extra_args") or {})
    inner = extra.get("gradient_clipping")
    if inner is not None and draft.given("gradient_clipping") and inner != value:
        draft.error(
            f"`deepspeed_extra_args.gradient_clipping: {inner}` contradicts `gradient_clipping:"
            f" {value:g}`",
            ("deepspeed_extra_args", "gradient_clipping"),
            hint="delete one of them",
        )
        return
    if inner is None and value == 1.0:
        extra["gradient_clipping"] = 1.0
        draft.put(
            "deepspeed_extra_args",
            extra,
            "NeoX does not hand a `gradient_clipping` of 1.0 on, its default, and DeeperSpeed's"
            " default is no clipping",
        )
    elif inner is None and (value < 0 or value == 0):
        draft.warn(f"`gradient_clipping: {value:g}` means no clipping at all", "gradient_clipping")


def _attention_types(draft: Draft, layers: int | None) -> set[str]:
    """The kinds of attention used; checks that the pattern fills all layers (NeoX
    megatron/utils.py:326-353)."""
    config = draft.values.get("attention_config")
    if config is None:
        return {"global"}
    try:
        names = list(_expand(config, layers or 0))
    except (TypeError, KeyError, IndexError, ValueError):
        draft.error(
            "`attention_config` is not a list of [[kinds…], count] pairs",
            "attention_config",
            hint='[[["flash"], 60]], or [[["flash"], "all"]]',
        )
        return set()
    for name in sorted(set(names) - set(_ATTENTION)):
        draft.error(
            f"`attention_config` has the unknown kind `{name}`",
            "attention_config",
            hint=nearest(name, _ATTENTION),
        )
    draft.check(
        Rule(
            layers and len(names) != layers,
            f"`attention_config` describes {len(names)} layers, and `num_layers` is {layers}",
            "attention_config",
            hint='[[["flash"], "all"]] fits any number',
        )
    )
    return set(names)


def _expand(config: list[Any], layers: int) -> Iterator[str]:
    if all(isinstance(item, str) for item in config):
        yield from config
        return
    for kinds, count in config:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(kinds)
        if count == "all":
            yield from kinds * (layers // len(kinds))
            return
        if not isinstance(count, int) or count < 0 or count > 100_000:
            raise ValueError(count)
        yield from kinds * count


def _check_experts(draft: Draft, shape: Shape) -> None:
    stage, fork = (
        (draft.values.get("zero_optimization") or {}).get("stage"),
        draft.flavor == "tilde",
    )
    draft.check(
        Rule(
            stage == 3 or (stage == 2 and not fork),
            f"experts do not work with ZeRO stage {stage}",
            ("zero_optimization", "stage"),
            hint="stage 1",
        ),
        Rule(
            fork and shape.pipeline >= 1,
            "experts do not work with pipeline parallelism",
            "pipe_parallel_size",
            hint="pipe_parallel_size: 0",
        ),
        Rule(
            fork and draft.get("sequence_parallel"),
            "experts do not work with sequence parallelism",
            "sequence_parallel",
        ),
    )


def _divisor_hint(number: int, tensor: int) -> str:
    fits = [str(size) for size in (1, 2, 4, 8, 16, 32) if number % size == 0 and size != tensor]
    return f"`model_parallel_size` of {', '.join(fits)}" if fits else ""
