"""GPU memory of a NeoX run: its keys as the shape and layout that `recipes.memory` reckons with."""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.config.decision import Decision
from hpctrain.recipes.contract import Context
from hpctrain.recipes.memory import REAL_SIZE, RESERVED_MEGATRON, Change, Layout, Shape, judge, need
from hpctrain.recipes.neox import batch
from hpctrain.recipes.neox.draft import Draft
from hpctrain.recipes.pace import pace

_GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu", "mish_glu")
_LEAST_VOCABULARY = 32_000  # the tokenizer's file tells the real one, and is not read here
_MOST_NODES = 8192


def decide(
    draft: Draft, context: Context, ranks: batch.Shape, zero_stage: int
) -> tuple[Decision, ...]:
    """Adds what does not fit to the draft's problems; nothing where the keys do not tell enough."""
    shape = _shape(draft)
    layout = _layout(draft, ranks, zero_stage) if shape and ranks.data else None
    if shape is None or layout is None or any(one.level == "error" for one in draft.problems):
        return ()
    changes = list(_changes(draft, context, ranks, shape, layout))
    decisions, problems = judge(context, shape, layout, context.spec.where("nodes"), changes)
    draft.problems += problems
    batch_size, iterations = draft.number("train_batch_size"), draft.number("train_iters")
    paced = pace(context, shape, layout, batch_size, iterations) if batch_size else ()
    return (*decisions, *paced)


def _shape(draft: Draft) -> Shape | None:
    """NeoX's `intermediate_size` is what a gated activation's two halves and output take together
    (megatron/model/transformer.py, ParallelMLP): a third of it is each one's width."""
    layers, hidden = draft.number("num_layers"), draft.number("hidden_size")
    heads = draft.number("num_attention_heads")
    if not layers or not hidden or not heads:
        return None
    gated = str(draft.get("activation")).lower() in _GATED
    given = draft.number("intermediate_size")
    whole = given or (8 * hidden if gated else 4 * hidden)
    key = (draft.number("num_kv_heads") or heads) * (hidden // heads)
    return Shape(
        layers,
        hidden,
        hidden,
        key,
        whole // 3 if gated else whole,
        draft.number("padded_vocab_size") or _LEAST_VOCABULARY,
        heads,
        gated=gated,
        tied=draft.get("no_weight_tying") is not True,
    )


def _layout(draft: Draft, ranks: batch.Shape, zero_stage: int) -> Layout | None:
    micro, length = draft.number("train_micro_batch_size_per_gpu"), draft.number("seq_length")
    precision = str(draft.get("precision") or "fp16").lower()
    if not micro or not length or precision not in ("bfloat16", "fp16"):
        return None
    zero = draft.values.get("zero_optimization") or {}
    optimizer = draft.values.get("optimizer") or {}
    # Experts' uneven tokens, what lies in the host's memory and other optimizers are not reckoned.
    if (
        (draft.number("moe_num_experts") or 1) > 1
        or any("offload" in name and value for name, value in zero.items())
        or draft.get("checkpoint_in_cpu") is True
        or str(optimizer.get("type") or "adam").lower() != "adam"
    ):
        return None
    kinds = draft.values.get("data_types")
    wide = isinstance(kinds, dict) and kinds.get("grad_accum_dtype") == "fp32"
    own = precision == "bfloat16" and (
        (wide and zero_stage == 1) or (zero_stage == 0 and ranks.pipeline >= 1)
    )
    reduce, gather = (
        int(zero.get(name) or 5e8) for name in ("reduce_bucket_size", "allgather_bucket_size")
    )
    flash = "flash" in str(draft.get("attention_config"))
    batches = draft.number("gradient_accumulation_steps") or 1
    return Layout(
        "bf16opt" if own else f"zero{zero_stage}",
        micro * length,
        length,
        shards=ranks.data or 1,
        gpus=ranks.world,
        tensor=ranks.tensor,
        pipeline=ranks.stages,
        in_flight=min(ranks.stages, batches),
        accumulates=batches > 1,
        checkpointing=draft.get("checkpoint_activations") is True,
        style="megatron" if flash else "mds",
        split=draft.get("sequence_parallel") is True or draft.get("partition_activations") is True,
        loss="neox",
        reserve=RESERVED_MEGATRON,
        prefetch=2.0 * (2 * reduce + gather) if zero_stage in (1, 2) else 0.0,
    )


def _changes(
    draft: Draft, context: Context, ranks: batch.Shape, shape: Shape, layout: Layout
) -> Iterator[Change]:
    """The smallest changes of each kind, in NeoX's keys."""
    if not layout.checkpointing:
        yield Change("`checkpoint_activations: true`", layout._replace(checkpointing=True))
    if ranks.tensor > 1 and not layout.split:
        yield Change("`partition_activations: true`", layout._replace(split=True))
    micro = layout.tokens // layout.length
    if micro > 1:
        less = layout._replace(tokens=layout.length)
        yield Change("`train_micro_batch_size_per_gpu: 1`", less)
    gpu = (context.node_type.gpu_memory_gib or 0) * REAL_SIZE
    together, nodes = ranks.tensor * ranks.stages, ranks.nodes
    while gpu and nodes < _MOST_NODES and together:
        nodes *= 2
        world = nodes * ranks.ranks_per_node
        wider = layout._replace(shards=max(world // together, 1), gpus=world)
        if need(shape, wider).allocated <= gpu:
            yield Change(f"`nodes: {nodes}`", wider)
            return
