"""GPU memory that a training needs, from the model's shape and the way it is laid out. Pure.

Every term is one that its framework's source or a measured pair of runs shows; docs/memory.md lists
them with their sources and with the errors of the sums against other people's readings
(`tools/bench memory`). Bytes inside, GiB outside (2^30).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hpctrain.base.errors import Problem
from hpctrain.config.decision import Decision
from hpctrain.recipes.contract import Context

GIB = 1024**3
CONTEXT_GIB, NCCL_GIB = 0.9, 1.2  # outside the allocator (A100 and H100, torch 2); NCCL of several
RESERVED = 1.06  # of what is allocated, CUDA; an allocator that is not full keeps more
RESERVED_MEGATRON = 1.22  # five logs on MI250X and BigScience's runs: 1.20 to 1.28
REAL_SIZE = 0.99  # of a GPU's memory by its name is what a process gets: 79.15 of an A100's 80
TIGHT = 0.99  # of the GPU, by the total
COMPILED = 1.4  # a compiled layer's working set over the sum of what it saves
# Bytes for each element of tokens x vocabulary: logits, their copy in fp32, and gradients.
LOSS = {"hf": 16, "in place": 8, "neox": 8, "mds": 10, "chunked": 2, "verl": 10, "fused": 0}


class Shape(NamedTuple):
    """A decoder. Widths in numbers: `query` and `key` of all heads together, `mlp` of one gate;
    `experts` with `active` of them a token, `shared` the width of those that every token takes."""

    layers: int
    hidden: int
    query: int
    key: int
    mlp: int
    vocab: int
    heads: int = 0
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False
    experts: int = 0
    active: int = 0
    shared: int = 0

    @property
    def of_layer(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden * (self.query + self.key)
        one = (3 if self.gated else 2) * self.hidden
        mlp = one * (self.mlp * max(self.experts, 1) + self.shared) + self.hidden * self.experts
        return attention + mlp + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the table of tokens, or of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        tables = self.embedding * (1 if self.tied else 2)
        return self.layers * self.of_layer + tables + self.hidden


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json tells; None where a number lacks."""
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config

    def number(*names: str) -> int:
        found = next((config[name] for name in names if isinstance(config.get(name), int)), 0)
        return int(found)

    hidden, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    layers = number("num_hidden_layers", "n_layer")
    if not hidden or not heads or not layers or not number("vocab_size"):
        return None
    width = number("head_dim") or hidden // heads
    kind = str(config.get("model_type"))
    experts = number("num_experts", "num_local_experts", "n_routed_experts")
    mlp = number("moe_intermediate_size") if experts else 0
    return Shape(
        layers,
        hidden,
        heads * width,
        (number("num_key_value_heads") or heads) * width,
        mlp or number("intermediate_size", "n_inner") or 4 * hidden,
        number("vocab_size"),
        heads,
        gated=kind not in ("gpt_neox", "gpt2", "falcon", "opt", "phi", "apertus"),
        tied=bool(config.get("tie_word_embeddings", kind in ("gemma", "gemma2", "gpt2"))),
        qk_norm=kind.startswith(("qwen3", "gemma3", "olmo2", "olmo3")),
        experts=experts,
        active=number("num_experts_per_tok"),
        shared=number("shared_expert_intermediate_size"),
    )


class Layout(NamedTuple):
    """How a training is laid out on its GPUs.

    `sharding`: one (no sharding, pure bf16), ddp (fp32 masters on each), fsdp1, fsdp2, zero0 to
    zero3, bf16opt (DeepSpeed's BF16_Optimizer), distopt (Megatron's). `shards`: ranks that share
    what is sharded. `tokens`: of one micro batch, `length` of a sequence in it. `experts_over`:
    ranks that the experts are divided over. `in_flight`: micro batches whose activations exist at
    once (pipelines). `masters`: weights are kept in fp32. `optimizer_bytes`: of a parameter's
    states, where that is not Adam in the usual width. `adapters`: parameters of LoRA updates, None
    for all weights; `base_bits`: of a frozen base. `style`: hf, compiled, megatron (flash
    attention), mds (Megatron-DeepSpeed without). `split`: stored activations are divided over
    tensor parallelism. `residual`: bytes of one stored number; `saved`: bytes of a token and layer
    that are kept beside the layer's input. `logits_limit`: numbers that exist at once, where the
    loss goes in parts. `reserve`: what the allocator holds over what is allocated. `prefetch`:
    bytes of buckets and gathered weights, where the run sets them.
    """

    sharding: str
    tokens: int
    length: int
    shards: int = 1
    gpus: int = 1
    tensor: int = 1
    pipeline: int = 1
    experts_over: int = 1
    in_flight: int = 1
    accumulates: bool = False
    masters: bool = True
    optimizer_bytes: float = 0
    foreach: bool = True
    adapters: int | None = None
    base_bits: int = 16
    all_linears: bool = False
    checkpointing: bool = True
    style: str = "hf"
    split: bool = False
    residual: int = 2
    saved: float = 0.0
    loss: str = "hf"
    logits_limit: float = float("inf")
    reference: bool = False
    reserve: float = RESERVED
    prefetch: float = 0.0


class Need(NamedTuple):
    """GiB of the fullest GPU. `parts` add up to `allocated`; `least` is a lower bound; `total`:
    with what the allocator keeps and what lies outside it. `phase`: backward or optimizer step."""

    parts: Mapping[str, float]
    least: float
    allocated: float
    total: float
    phase: str

    @property
    def words(self) -> str:
        """The parts, for a person."""
        shown = {name: gib for name, gib in self.parts.items() if gib >= 0.05}
        return " + ".join(f"{name} {gib:.1f}" for name, gib in shown.items()) + " GiB"


def need(shape: Shape, layout: Layout) -> Need:
    """What the fullest GPU needs: the first stage of a pipeline, which holds the most micro batches
    at once, or the last, which has the logits."""
    ends = [layout._replace(loss="fused"), layout._replace(in_flight=1)]
    stages = [layout] if layout.pipeline == 1 else ends
    found = [_of_stage(shape, stage) for stage in stages]
    return max(found, key=lambda one: one.allocated)


def _of_stage(shape: Shape, layout: Layout) -> Need:
    owned = _parameters(shape, layout)
    weights, gradients, states, extra, early = _states(owned, shape, layout)
    stored, work = _activations(shape, layout)
    logits = _logits(shape, layout)
    gather = _gathered(shape, layout, owned)
    prealloc = early or (layout.accumulates and layout.adapters is None)
    first = stored + max(logits, work)
    # Without buffers made before, gradients appear while the stored inputs go, logits long gone.
    late = not prealloc and gradients + work > first
    made = gradients if prealloc else 0.0
    backward = weights + states + gather + (gradients + work if late else first + made)
    step = weights + states + extra
    parts = {"weights": weights, "optimizer": states}
    if step >= backward:
        parts["gradients and copies"] = extra
    else:
        parts |= {"gradients": gradients} if late or prealloc else {}
        parts |= {} if late else {"checkpoints": stored}
        parts["logits" if logits > work and not late else "activations"] = (
            work if late else max(logits, work)
        )
        parts["gathered"] = gather
    allocated = max(backward, step)
    kept = logits / max(LOSS[layout.loss], 1) * 2 if layout.pipeline == 1 else 0.0
    sure = 0.95 if layout.checkpointing else 0.6  # of what is kept; inputs of layers are, each once
    bound = weights + states + made + sure * stored + kept
    outside = CONTEXT_GIB + (NCCL_GIB if layout.gpus > 1 else 0.0)
    return Need(
        {name: size / GIB for name, size in parts.items()},
        max(bound, weights + states + gradients, step if early else 0.0) / GIB,
        allocated / GIB,
        allocated / GIB * layout.reserve + outside,
        "the optimizer step" if step >= backward else "the backward pass",
    )


def _parameters(shape: Shape, layout: Layout) -> float:
    """Parameters of the fullest pipeline stage, divided over tensor parallelism."""
    layers = -(-shape.layers // layout.pipeline)
    tables = 1 if shape.tied or layout.pipeline > 1 else 2
    apart = shape.experts * 3 * shape.hidden * shape.mlp * (1 - 1 / layout.experts_over)
    return (layers * (shape.of_layer - apart) + tables * shape.embedding) / layout.tensor


def _states(owned: float, shape: Shape, layout: Layout) -> tuple[float, float, float, float, bool]:
    """Bytes of weights, gradients, optimizer, of all gradients and copies at the step, and whether
    gradients exist before the backward pass (docs/memory.md, States)."""
    shards, kind = layout.shards, layout.sharding
    if layout.adapters is not None:
        return _adapter_states(owned, shape, layout)
    wide = 4 if layout.masters else 2
    adam = layout.optimizer_bytes or 2 * wide
    foreach = wide if layout.foreach else 0
    part = owned / shards
    bf16 = 2 * owned
    table = {
        "one": (wide * owned, wide * owned, adam * owned, (wide + foreach) * owned),
        "ddp": (4 * owned, 4 * owned, adam * owned, (4 + foreach) * owned),
        "fsdp": (wide * part, wide * part, adam * part, (wide + foreach) * part),
        "zero0": (bf16, bf16, 12 * owned, 4 * owned),
        # The gradients shrink to the rank's own part before their fp32 copy is made, which for one
        # rank is all of them (deepspeed zero/stage_1_and_2.py `step`).
        "zero1": (bf16, bf16, 12 * part, (2 + 4) * part),
        "zero2": (bf16, 2 * part, 12 * part, (2 + 4) * part),
        "zero3": (2 * part, 2 * part, 12 * part, 2 * part + 4 * min(part, 1e9)),
        "bf16opt": (bf16, 6 * owned, 12 * part, 6 * owned),
        "distopt": (bf16, 4 * owned, 12 * part, 4 * owned),
    }
    weights, gradients, states, extra = table["fsdp" if kind.startswith("fsdp") else kind]
    if layout.reference:
        weights += 2 * (part if kind.startswith(("fsdp", "zero3")) else owned)
    early = kind.startswith(("zero", "bf16opt", "distopt"))
    return weights, gradients, states, max(extra, gradients if not early else 0.0), early


def _adapter_states(
    owned: float, shape: Shape, layout: Layout
) -> tuple[float, float, float, float, bool]:
    tables = shape.embedding * (1 if shape.tied else 2)
    if layout.base_bits == 4:
        # Blocks of 64 with a scale in fp32; embedding and head go to fp32 (peft
        # `prepare_model_for_kbit_training`), or stay as they are.
        weights = (owned - tables) * (0.5 + 4 / 64) + tables * layout.residual
    else:
        weights = owned * layout.base_bits / 8
    shared = layout.sharding in ("fsdp1", "fsdp2", "zero3")
    mine = layout.adapters or 0
    return weights / (layout.shards if shared else 1), 4.0 * mine, 8.0 * mine, 8.0 * mine, False


def _activations(shape: Shape, layout: Layout) -> tuple[float, float]:
    """Bytes that stay until the backward pass, and those of the one layer that is computed anew."""
    hidden, tensor = shape.hidden, layout.tensor
    mlp = shape.mlp * max(shape.active, 1) + shape.shared
    if layout.style == "mds":
        each = hidden * (10 + 24 / tensor) + 5 * shape.heads * layout.length / tensor
    else:
        lean = layout.style != "hf"
        wide = (8 if lean else 16) * hidden
        if layout.adapters is not None:  # a frozen linear keeps no input
            wide = (4 if lean else 12) * hidden + (4 if layout.all_linears else 2) * hidden
        each = wide + 4 * (shape.query + shape.key) + (6 if lean else 8) * mlp
        each += 6 * (shape.query + shape.key) if shape.qk_norm else 0
        each += 2 * hidden * (2 * shape.active + 1) if shape.experts else 0
        # Without sequence parallelism the norms' inputs are whole on every rank.
        each = each / tensor if layout.split else (each - 8 * hidden) / tensor + 8 * hidden
    layers = -(-shape.layers // layout.pipeline) * layout.in_flight
    if not layout.checkpointing:
        return layers * layout.tokens * each, 0.0
    stored = layers * layout.tokens * (layout.residual * hidden + layout.saved)
    work = layout.tokens * (each + (4 * hidden + 4 * mlp) / tensor)
    factor = COMPILED if layout.style == "compiled" else 1.0
    return stored / (tensor if layout.split else 1), work * factor


def _logits(shape: Shape, layout: Layout) -> float:
    numbers = min(layout.tokens * shape.vocab, layout.logits_limit) / layout.tensor
    return numbers * LOSS[layout.loss]


def _gathered(shape: Shape, layout: Layout, owned: float) -> float:
    """Bytes of gathered weights and of buckets (docs/memory.md, Gathering)."""
    tables = shape.embedding * (1 if shape.tied else 2) / layout.tensor
    layer = shape.of_layer / layout.tensor
    if layout.prefetch or layout.shards == 1:
        return layout.prefetch
    full = layout.adapters is None
    if layout.sharding == "fsdp2" and layout.pipeline > 1:
        return 6 * owned  # whole until the last micro batch, with gradients in fp32 (torchtitan)
    gathered = {
        "fsdp1": (4 * layer + 4 * tables) / (1 if full else 2),
        "fsdp2": max(4 * tables + 2 * layer, 10 * layer + tables) / (1 if full else 2),
        "zero1": min(3e9, 2 * owned),
        "zero2": min(3e9, 2 * owned),
        "zero3": min(2e9, 2 * owned) + 2 * tables,
        "bf16opt": 1e9,
    }.get(layout.sharding, 0.0)
    if layout.sharding == "fsdp1" and full and layout.accumulates:
        gathered += 2 * owned  # gradients of `no_sync` are not sharded (accelerate)
    return gathered


CANNOT, LIKELY = "it cannot fit", "it will very likely run out"


def runs_out(problem: Problem) -> bool:
    """Whether a problem says that a run needs more memory than its GPUs have."""
    return problem.what.startswith((CANNOT, LIKELY))


class Change(NamedTuple):
    """What a user could set, in the recipe's own keys, and the layout that it gives."""

    words: str
    layout: Layout


def judge(
    context: Context, shape: Shape, layout: Layout, where: str, changes: Sequence[Change]
) -> tuple[tuple[Decision, ...], list[Problem]]:
    """Whether it fits the GPUs of the run's nodes, on three levels, with the changes that would.

    Cannot fit: the lower bound is above the GPU. Will very likely run out: what is expected to be
    allocated is; `estimate.memory_gib`, a peak that was measured, says otherwise. Tight: the
    allocator's reserve and what lies outside it included.
    """
    found, spec = need(shape, layout), context.spec
    nominal = context.node_type.gpu_memory_gib if context.gpus_per_node else None
    measured, at = spec.memory_gib, spec.where("estimate", "memory_gib")
    about = f"at least {found.least:.0f}, {found.total:.0f} with allocator and NCCL"
    about += f"; {found.words}; the most in {found.phase}"
    if not nominal:
        about += "; not compared: the site's profile has no `gpu_memory_gib`"
        return (Decision("memory.gpu_gib", round(found.allocated, 1), about, where),), []
    gpu = nominal * REAL_SIZE
    expected = measured or found.allocated
    decision = Decision("memory.gpu_gib", round(expected, 1), f"of {gpu:.1f}; {about}", where)
    why = f"{found.words}; the most in {found.phase}"
    fits = [one for one in changes if need(shape, one.layout).allocated <= gpu]
    hint = "; ".join(
        f"{one.words} ({need(shape, one.layout).allocated:.0f} GiB)" for one in fits[:3]
    )
    level = "error"
    if found.least > gpu and (measured is None or measured > gpu):
        what = f"{CANNOT}: at least {found.least:.0f} GiB are needed of each GPU's {gpu:.1f}"
    elif expected > gpu:
        what = f"{LIKELY}: {expected:.0f} GiB expected of each GPU's {gpu:.1f}"
        why += "; `estimate: {memory_gib: …}`, a peak that you measured, says otherwise"
    elif measured is None and found.total > TIGHT * gpu:
        what = (
            f"it is tight: {found.allocated:.0f} GiB expected, {found.total:.0f} with allocator and"
            f" NCCL, of each GPU's {gpu:.1f}"
        )
        level = "warning"
    else:
        return (decision,), []
    place = at if measured and measured > gpu else where
    return (decision,), [Problem(what, place, why, hint and f"that would fit: {hint}", level)]
