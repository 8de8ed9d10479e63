"""What NeoX's own converter to Hugging Face needs to be right: the model class, its config file,
and a job for it. Pure.

tools/ckpts/convert_neox_to_hf.py (EleutherAI/gpt-neox ea7aefd, tilde-nlp/llm-gpt-neox 374a5c6)
reads one YAML file with defaults of its own: pipe-parallel-size 1 where NeoX has 0, rms-norm-epsilon
1e-6 for 1e-8, in the fork rotary-emb-base 1000 for 10000, none for model-parallel-size; and it takes
intermediate-size for the size of a gated layer, which NeoX makes a third of it
(megatron/model/transformer.py, ParallelMLP). So it gets a file of its own that says all of these.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from hpctrain.base.shell import output_pattern
from hpctrain.base.units import format_mem_gib, format_time
from hpctrain.config.run import absolute
from hpctrain.config.sbatch import option_text
from hpctrain.config.site import Partition
from hpctrain.recipes.contract import Context
from hpctrain.recipes.neox.configs import config_text
from hpctrain.recipes.neox.draft import Draft

CONVERTER = "tools/ckpts/convert_neox_to_hf.py"
CONFIG = "config.export.yml"
# Keys that the converter reads and whose default in NeoX it does not share, or may not.
_SAID = (
    "pipe_parallel_size",
    "model_parallel_size",
    "norm",
    "layernorm_epsilon",
    "rms_norm_epsilon",
    "pos_emb",
    "rotary_pct",
    "rotary_emb_base",
    "activation",
    "gpt_j_residual",
    "no_weight_tying",
    "use_bias_in_norms",
    "use_bias_in_attn_linear",
    "use_bias_in_mlp",
    "make_vocab_size_divisible_by",
    "tokenizer_type",
)
_KEPT_GROUPS = ("Model", "Tokenizer", "Parallelism")
_KEPT = ("vocab_file", "merge_file", "fp16", "loss_mask_pairs", "loss_mask_alternating_individual")
_GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")
_PRECISIONS = {"bfloat16": "bf16", "fp16": "fp16"}
_ATTENTION_OF_HF = {"global", "flash"}
_TIME_S = 2 * 3600
_CORES = 8
_ASSUMED_VOCABULARY = 131072  # for memory; the tokenizer is not read when a run is rendered


def decide_export(draft: Draft, context: Context) -> tuple[dict[str, Any], str]:
    """What the template of the export job needs, and the text of its config; `refused` says why
    there is no such job.

    `directives` are those of a CPU job: the converter needs no GPU, and would load the whole model
    onto one.
    """
    architecture, refused = find_architecture(draft)
    if refused:
        return {"refused": refused, "architecture": None}, ""
    values = export_values(draft, architecture)
    header = (
        (
            f"The model for NeoX's converter to Hugging Face, as architecture `{architecture}`;"
            " used by export.sbatch."
        ),
        (
            "Made by hpctrain render. It differs from the training configs where the converter"
            " reads a key in its own way."
        ),
    )
    precision = _PRECISIONS.get(str(draft.get("precision") or "").lower(), "fp32")
    found = {
        "refused": "",
        "architecture": architecture,
        "precision": precision,
        "converter": os.path.join(
            absolute(context.options["dir"], context.spec.base_dir), CONVERTER
        ),
        "config": CONFIG,
        "directives": _directives(context, _memory_gib(draft, precision)),
    }
    return found, config_text(values, draft.keys, header)


def find_architecture(draft: Draft) -> tuple[str, str]:
    """(`neox`, `llama` or `mistral`, and why none of them is this model)."""
    architecture = {("rmsnorm", "swiglu"): "llama", ("layernorm", "gelu"): "neox"}.get(
        (draft.get("norm"), draft.get("activation")), ""
    )
    refused = next((why for wrong, why in _against(draft, architecture) if wrong), "")
    if architecture == "llama" and draft.given("sliding_window_width"):
        architecture = "mistral"
    return ("", refused) if refused else (architecture, "")


def _against(draft: Draft, architecture: str) -> Iterator[tuple[object, str]]:
    """(whether it is so, what then speaks against a Hugging Face model of that class)."""
    get, other = draft.get, sorted(_attention_types(draft) - _ATTENTION_OF_HF)
    unknown = "NeoX's converter does not know"
    yield get("gpt_j_tied"), f"{unknown} `gpt_j_tied`"
    yield (draft.number("moe_num_experts") or 1) > 1, f"{unknown} experts"
    yield other, f"{unknown} attention `{''.join(other[:1])}`"
    positions = f"the Hugging Face models have rotary positions, not `pos_emb: {get('pos_emb')}`"
    yield get("pos_emb") != "rotary", positions
    attention, mlp = get("use_bias_in_attn_linear"), get("use_bias_in_mlp")
    if architecture == "llama":
        partial = float(get("rotary_pct")) != 1.0
        yield partial, "Llama turns all dimensions of a head: `rotary_pct` must be 1.0"
        drops = "NeoX's converter drops the biases of"
        yield attention, f"{drops} `use_bias_in_attn_linear: true` for Llama"
        in_upstream = mlp and draft.flavor == "upstream"
        yield in_upstream, f"{drops} `use_bias_in_mlp: true` for Llama"
    elif architecture == "neox":
        kv_heads, heads = draft.number("num_kv_heads"), draft.number("num_attention_heads")
        grouped = kv_heads is not None and kv_heads != heads
        yield grouped, "the Hugging Face GPT-NeoX model has no grouped-query attention"
        biased = attention and mlp
        yield not biased, "the Hugging Face GPT-NeoX model has biases in attention and MLP"
    yield (
        not architecture,
        f"no Hugging Face model of NeoX's converter has `norm: {get('norm')}` with `activation:"
        f" {get('activation')}`",
    )


def export_values(draft: Draft, architecture: str) -> dict[str, Any]:
    """The values of config.export.yml."""
    values = {
        name: value
        for name, value in draft.values.items()
        if value is not None
        and name in draft.keys
        and (draft.keys[name].group in _KEPT_GROUPS or name in _KEPT)
    }
    for name in _SAID:
        if name in draft.keys and draft.get(name) is not None:
            values[name] = draft.get(name)
    values.pop("expansion_factor", None)
    size = mlp_size(draft)
    # The fork's converter takes the third itself.
    values["intermediate_size"] = (
        3 * size if draft.flavor == "tilde" and architecture != "neox" else size
    )
    return values


def mlp_size(draft: Draft) -> int:
    """The inner size of an MLP as NeoX builds it: a third for gated activations, and rounded up
    (ParallelMLP.__init__)."""
    hidden = draft.number("hidden_size") or 0
    size = draft.number("intermediate_size") or int(
        float(draft.get("expansion_factor") or 4) * hidden
    )
    if draft.get("activation") in _GATED:
        return 256 * math.ceil((int(size * 2 / 3) // 2) / 256)
    return 512 * math.ceil(size / 512)


def _memory_gib(draft: Draft, precision: str) -> float:
    """Room for the checkpoint's weights and the Hugging Face model, which the converter makes in
    fp32, at once."""
    hidden, layers, heads = (
        draft.number(name) or 1 for name in ("hidden_size", "num_layers", "num_attention_heads")
    )
    kv_share = (draft.number("num_kv_heads") or heads) / heads
    matrices = 3 if draft.get("activation") in _GATED else 2
    per_layer = hidden * hidden * (2 + 2 * kv_share) + matrices * hidden * mlp_size(draft)
    parameters = layers * per_layer + 2 * _ASSUMED_VOCABULARY * hidden
    return memory_gib(parameters * (4 if precision == "fp32" else 2), precision)


def memory_gib(checkpoint_bytes: float, precision: str) -> float:
    """GiB that a conversion of so many bytes of weights takes: them, an fp32 model, and a tenth for
    copies."""
    factor = 2 if precision == "fp32" else 3
    return math.ceil(checkpoint_bytes * factor * 1.1 / 2**30) + 4


def _directives(context: Context, mem_gib: float) -> list[dict[str, str]]:
    spec, site = context.spec, context.site
    slurm = site.values["slurm"]
    partition = _partition(context, mem_gib)
    node = partition.node_type if partition else context.node_type
    limit = (partition.max_time_s if partition else None) or _TIME_S
    chosen: dict[str, tuple[Any, str]] = {
        "job-name": (f"export-{spec.name}", ""),
        "account": (spec.account, ""),
        "partition": (
            partition.slurm_name if partition else None,
            "the converter needs no GPU" if not node.gpus else "",
        ),
        "qos": (partition.qos if partition else None, ""),
        "nodes": (1, ""),
        "ntasks": (1, ""),
        "cpus-per-task": (min(_CORES, node.usable_cores), ""),
        "mem": (
            format_mem_gib(min(mem_gib, node.memory_gib)),
            "for the checkpoint's weights and an fp32 model; hpctrain export knows their size",
        ),
        "time": (format_time(min(_TIME_S, limit)), ""),
        "hint": (slurm["hint"], ""),
        "constraint": (
            (
                slurm["constraint"]
                if partition is None or node.name == context.node_type.name
                else None
            ),
            "",
        ),
        "no-requeue": (True, "asked again, it begins anew"),
        "open-mode": ("append", ""),
        "chdir": (context.run_dir, ""),
        "output": (f"{output_pattern(context.run_dir)}/export-%j.out", ""),
    }
    chosen.update({option: (value, "the site's rule") for option, value in slurm["always"].items()})
    out = []
    for option, (value, why) in chosen.items():
        text = option_text(option, value)
        if value is not None and text is not None:
            out.append({"option": option, "value": text, "why": why})
    return out


def _partition(context: Context, mem_gib: float) -> Partition | None:
    """The site's CPU partition, or the smallest other one that has the memory; the run's own where
    no profile says more."""
    site, spec = context.site, context.spec
    name = site.values["tools"]["cpu_partition"]
    preferred = site.partition(name) if name else None
    others = sorted(
        (p for p in site.partitions.values() if not p.debug and not p.whole_nodes),
        key=lambda p: (p.node_type.gpus > 0, p.node_type.memory_gib),
    )
    for partition in ([preferred] if preferred else []) + others:
        if partition.node_type.memory_gib >= mem_gib:
            return partition
    return preferred or (site.partition(spec.partition) if spec.partition else None)


def _attention_types(draft: Draft) -> set[str]:
    """The kinds of attention in `attention_config`, which is a list of `[[kind, ...], count]`."""
    found: set[str] = set()
    for item in draft.get("attention_config") or ():
        kinds = item[0] if isinstance(item, list) and item else item
        found.update(str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds]))
    return found
