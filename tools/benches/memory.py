"""GPU memory: what `hpctrain.recipes.memory` predicts against other people's readings.

tools/bench memory [--all] [--json]      --all: every row with its error

A third of the readings, by their id, is kept back: no constant was chosen by them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path

from hpctrain.recipes.known_models import shape_by_name
from hpctrain.recipes.memory import RESERVED, RESERVED_MEGATRON, TIGHT, Layout, Need, Shape, need

POINTS = Path(__file__).parents[2] / "tests/data/memory/points.csv"
# layers, hidden, query, key, mlp, vocabulary (the models' own config.json)
SHAPES = {
    "qwen1.5-moe-a2.7b": Shape(
        24, 2048, 2048, 2048, 1408, 151936, experts=60, active=4, shared=5632
    ),
    "gpt2-1.3b": Shape(24, 2048, 2048, 2048, 8192, 50304, heads=16, gated=False, tied=True),
    "gpt-175b-lumi": Shape(
        70, 14336, 14336, 14336, 57344, 50304, heads=112, gated=False, tied=True
    ),
    # litgpt's
    "phi-1.5": Shape(24, 2048, 2048, 2048, 8192, 51200, gated=False),
    "phi-3-mini": Shape(32, 3072, 3072, 3072, 8192, 32064),
    "tiny-llama-1.1b": Shape(22, 2048, 2048, 256, 5632, 32000),
    "stablelm-alpha-3b": Shape(16, 4096, 4096, 4096, 16384, 50688, gated=False),
    "falcon-7b": Shape(32, 4544, 4544, 64, 18176, 65024, gated=False, tied=True),
}
LOSSES = {
    "hf_fp32": "hf",
    "titan": "hf",
    "foak": "in place",
    "titan_compiled": "in place",
    "litgpt": "in place",
    "mds": "mds",
    "mcore": "neox",
    "chunked": "chunked",
    "verl": "verl",
    "liger": "fused",
    "fused": "fused",
    "cce": "fused",
}
SHARDING = {"single": "one", "ds_fp16_z1": "zero1", "ds_bf16opt": "bf16opt", "verl": "fsdp1"}


def shape_of(row: dict[str, str]) -> Shape | None:
    found = re.fullmatch(r"gpt-(\d+)x(\d+)", row["model"])
    if not found:
        return SHAPES.get(row["model"]) or shape_by_name(row["model"])
    layers, hidden = int(found[1]), int(found[2])
    vocab = re.search(r"vocab (\d+)", row["extra"])
    tokens = int(vocab[1]) if vocab else 50304
    width = 4 * hidden
    heads = hidden // 128
    return Shape(layers, hidden, hidden, hidden, width, tokens, heads=heads, gated=False, tied=True)


def adapters(row: dict[str, str], shape: Shape) -> int | None:
    """Parameters of the update, by its rank and the linears that it is on."""
    if row["tuning"] == "full":
        return None
    rank = re.search(r"r(\d+)", row["lora"])
    attention = 2 * shape.hidden + shape.query + shape.key
    mlp = 3 * (shape.hidden + shape.mlp)
    width = 2 * attention + (mlp if "all" in row["lora"] else 0)
    if "qv" in row["lora"] and "qkvo" not in row["lora"]:
        width = attention
    copies = 4 if "4 adapters" in row["lora"] else 1
    return int(rank[1]) * width * shape.layers * copies if rank else 0


def layout_of(row: dict[str, str], shape: Shape) -> Layout:
    def number(name: str) -> int:
        return int(float(row[name] or 1))

    tensor, pipeline, context = number("tp"), number("pp"), number("cp")
    gpus, extra = number("gpus"), row["extra"]
    sharding = SHARDING.get(row["sharding"], row["sharding"])
    frozen = row["tuning"] != "full"
    megatron, mds = row["loss"] == "mcore", row["loss"] == "mds"
    style = "mds" if mds else "hf"
    if "compile" in extra or row["framework"].startswith(("prime", "torchtitan")):
        style = "compiled"
    style = "megatron" if megatron else style
    micro = number("micro_batch")
    batches = number("grad_accum")
    if "local batch" in extra:
        batches, micro = micro, 1
    doubled = 2 if row["task"] == "dpo" and "both replies" not in extra else 1
    fsdp_lora = frozen and row["sharding"] == "fsdp1" and row["group"] == "fms FSDP1"
    states = 0.0
    if "8bit" in row["optimizer"] or "8 bit" in row["optimizer"]:
        states = 2.1
    if "bf16 moments" in row["optimizer"]:
        states = 4
    return Layout(
        sharding,
        number("seq") * micro * doubled // context,
        number("seq"),
        shards=max(number("dp") * context, 1),
        gpus=gpus,
        tensor=tensor,
        pipeline=pipeline,
        experts_over=number("ep"),
        in_flight=min(pipeline, batches) if pipeline > 1 else 1,
        accumulates=batches > 1 and pipeline == 1,
        masters=row["precision"].startswith("fp32"),
        optimizer_bytes=states,
        foreach="fused" not in row["optimizer"] and "backward" not in row["optimizer"],
        adapters=adapters(row, shape),
        base_bits=4
        if row["tuning"] == "qlora"
        else (32 if "fp32 base" in row["precision"] else 16),
        all_linears="all" in row["lora"],
        checkpointing=row["checkpointing"] != "none",
        style=style,
        reserve=RESERVED_MEGATRON if mds else RESERVED,
        split="sp" in extra.split(",") or row["framework"] == "torchtitan",
        residual=4 if fsdp_lora else 2,
        saved=selective(row, shape),
        loss=LOSSES[row["loss"]],
        reference=row["task"] == "dpo" and not frozen,
    )


def selective(row: dict[str, str], shape: Shape) -> float:
    """What torchtitan's op-wise checkpointing keeps: attention's output and half of the products."""
    products = shape.query + 2 * shape.key + 2 * shape.hidden + 2 * shape.mlp
    return 2 * shape.query + products if row["checkpointing"] == "selective-op" else 0.0


def measured(row: dict[str, str], found: Need) -> tuple[float, float] | None:
    """(prediction, reading) of the first figure that is there."""
    if not row["peak_gib"]:
        return None
    kind = row["peak_metric"].rstrip("?")
    reserved = found.total - 0.9 - (1.2 if int(row["gpus"]) > 1 else 0)
    mine = {"allocated": found.allocated, "active": found.allocated, "reserved": reserved}
    return mine.get(kind, found.total), float(row["peak_gib"])


def usable(row: dict[str, str]) -> bool:
    """Whether a reading says enough to be compared, and is of what the formulas cover."""
    told = " ".join(row[name] for name in ("checkpointing", "extra", "optimizer", "sharding"))
    beyond = ("offload", "CPU", "step in backward", "verl", "selective,")
    return row["usable"] == "yes" and not any(word in told + "," for word in beyond)


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--all", action="store_true")
    arguments.add_argument("--json", action="store_true")
    asked = arguments.parse_args()
    with POINTS.open(encoding="utf-8") as file:
        figures = figures_of(list(csv.DictReader(file)), asked.all)
    if asked.json:
        print(json.dumps(figures, indent=1))
        return 0
    for name, values in figures.items():
        shown = "  ".join(f"{key} {value}" for key, value in values.items())
        print(f"{name:<22} {shown}")
    return 0


def figures_of(rows: list[dict[str, str]], tell: bool = False) -> dict[str, dict[str, float]]:
    """By group, and for the rows that are kept back or not: number, median and 90th percentile of
    the error in percent; and how the three levels would have judged."""
    errors: dict[str, list[float]] = {}
    judged: dict[str, list[tuple[bool, Need, float]]] = {}
    for row in rows:
        shape = shape_of(row)
        if shape is None or not usable(row):
            continue
        found = need(shape, layout_of(row, shape))
        pair = measured(row, found)
        part = "kept back" if int(row["id"][1:]) % 3 == 0 else "fitted"
        names = [row["group"]] if row["group"] == "litgpt" else [row["group"], part, "all"]
        for name in names:
            judged.setdefault(name, []).append((row["oom"] == "yes", found, float(row["gpu_gib"])))
            if pair:
                errors.setdefault(name, []).append(100 * (pair[0] / pair[1] - 1))
        if tell and pair:
            print(
                f"{row['id']} {row['group']:<20} {row['model']:<16} {row['tuning']:<6}"
                f" {row['loss']:<8} {pair[0]:7.1f} {pair[1]:7.1f} {100 * (pair[0] / pair[1] - 1):+6.1f}%"
                f" {'BOUND' if found.least > max(pair) * 1.0 and found.least > pair[1] else ''}"
            )
    out = {}
    for name, values in sorted(judged.items(), key=lambda one: one[0]):
        off = sorted(abs(one) for one in errors.get(name, [0.0]))
        fits = [one for one in values if not one[0]]
        ooms = [one for one in values if one[0]]
        out[name] = {
            "n": len(errors.get(name, [])),
            "bias": round(statistics.median(errors.get(name, [0.0])), 1),
            "median": round(statistics.median(off), 1),
            "p90": round(off[int(0.9 * (len(off) - 1))], 1),
            "fits": len(fits),
            "cannot_wrong": sum(found.least > gpu for _, found, gpu in fits),
            "likely_wrong": sum(found.allocated > gpu for _, found, gpu in fits),
            "tight_wrong": sum(found.total > TIGHT * gpu for _, found, gpu in fits),
            "ooms": len(ooms),
            "cannot": sum(found.least > gpu for _, found, gpu in ooms),
            "likely": sum(found.allocated > gpu for _, found, gpu in ooms),
            "tight": sum(found.total > TIGHT * gpu for _, found, gpu in ooms),
        }
    return out


if __name__ == "__main__":
    sys.exit(main())
