"""A link's decision on a checkpoint of 192 nodes, beside listing its files and beside reading
them."""

# tools/bench guard [--tp 8] [--dp 192] [--payload-kib 64]

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "standin"))
import checkpoints  # noqa: E402

from hpctrain.base.paths import shipped_module  # noqa: E402
from hpctrain.runtime.settings import parse_settings  # noqa: E402
from hpctrain.runtime.survey import Survey, choose  # noqa: E402

Metadata = shipped_module("sandbox", "standin").Metadata


def measured(what: Callable[[], object]) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    what()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def deepspeed(folder: str, step: int, args: argparse.Namespace) -> str:
    return checkpoints.save(folder, step, args.tp, args.dp)


def dcp(folder: str, step: int, args: argparse.Namespace) -> str:
    """A distributed checkpoint of one file a rank, with an index of ten entries for each."""
    path = Path(folder, f"step-{step}")
    path.mkdir(parents=True)
    payload = args.payload_kib * 1024 // 10 * 10
    names = [f"__{rank}_0.distcp" for rank in range(args.tp * args.dp)]
    for name in names:
        (path / name).write_bytes(b"x" * payload)
    index = Metadata([])
    for name in names:
        for part in range(10):
            entry = next(iter(Metadata([name]).storage_data.values()))
            entry.offset, entry.length = part * payload // 10, payload // 10
            index.storage_data[name, part] = entry
    (path / ".metadata").write_bytes(pickle.dumps(index, protocol=4))
    return str(path)


def safetensors(folder: str, step: int, args: argparse.Namespace) -> str:
    """A Hugging Face checkpoint whose model lies in as many shards, each of ten tensors."""
    path = Path(folder, f"checkpoint-{step}")
    path.mkdir(parents=True)
    number, part = args.tp * args.dp, args.payload_kib * 1024 // 10
    names = [f"model-{index + 1:05d}-of-{number:05d}.safetensors" for index in range(number)]
    header = {
        f"w{i}": {"dtype": "U8", "shape": [part], "data_offsets": [i * part, (i + 1) * part]}
        for i in range(10)
    }
    text = json.dumps(header).encode()
    for name in names:
        (path / name).write_bytes(len(text).to_bytes(8, "little") + text + b"x" * 10 * part)
    weights = {f"{name}.w": name for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(checkpoints.torch_file({}))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return str(path)


KINDS = {"deepspeed": deepspeed, "dcp": dcp, "hf-trainer": safetensors}


def bench(layout: str, args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as top:
        folder = os.path.join(top, "ckpt")
        os.mkdir(folder)
        for step in (100, 200):
            newest = KINDS[layout](folder, step, args)
        names = [os.path.join(newest, name) for name in os.listdir(newest)]
        guard = {"schema_version": 1, "layout": layout, "checkpoint_dir": folder}
        if layout == "deepspeed":
            guard.update(
                tensor_parallel=args.tp, pipeline_parallel=0, data_parallel=args.dp, zero_stage=1
            )
        settings = parse_settings(guard)
        choice = choose(Survey(settings))
        if choice.name != os.path.basename(newest):
            raise SystemExit(f"{layout}: the guard chose {choice}")
        found = {
            "guard": measured(lambda: choose(Survey(settings))),
            "stat": measured(lambda: [os.stat(name) for name in names]),
            "read": measured(lambda: [Path(name).read_bytes() for name in names]),
        }
    ratio = {
        key: found["guard"]["cpu_s"] / max(found[key]["cpu_s"], 1e-9) for key in ("stat", "read")
    }
    cpu_s = found["guard"]["cpu_s"]
    print(
        f"{layout}: {len(names)} files: the guard's decision takes {cpu_s:.3f} s of CPU, "
        f"{ratio['stat']:.1f} x listing their sizes, {ratio['read']:.2f} x reading them "
        f"({args.payload_kib} KiB each)"
    )
    return {"files": len(names), **found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--dp", type=int, default=192)
    parser.add_argument("--payload-kib", type=int, default=64)
    args = parser.parse_args()
    whole = checkpoints.torch_file
    checkpoints.torch_file = lambda values: whole(values, args.payload_kib * 1024)
    found = {layout: bench(layout, args) for layout in KINDS}
    out = Path(__file__).parents[2] / ".bench"
    out.mkdir(exist_ok=True)
    (out / "guard.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
