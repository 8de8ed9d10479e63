"""A link's decision on a checkpoint of 192 nodes, beside listing its files and beside reading them."""
# tools/bench guard [--tp 8] [--dp 192] [--payload-kib 64]

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "standin"))
import checkpoints  # noqa: E402

from hpctrain.runtime.settings import parse_settings  # noqa: E402
from hpctrain.runtime.survey import Survey, choose  # noqa: E402


def measured(what) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    what()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--dp", type=int, default=192)
    parser.add_argument("--payload-kib", type=int, default=64)
    args = parser.parse_args()
    whole = checkpoints.torch_file
    checkpoints.torch_file = lambda values: whole(values, args.payload_kib * 1024)
    with tempfile.TemporaryDirectory() as folder:
        for step in (100, 200):
            checkpoints.save(folder, step, args.tp, args.dp)
        newest = os.path.join(folder, "global_step200")
        names = [os.path.join(newest, name) for name in os.listdir(newest)]
        settings = parse_settings({"schema_version": 1, "layout": "deepspeed", "checkpoint_dir": folder, "tensor_parallel": args.tp,
                                   "pipeline_parallel": 0, "data_parallel": args.dp, "zero_stage": 1})  # fmt: skip
        found = {
            "guard": measured(lambda: choose(Survey(settings))),
            "stat": measured(lambda: [os.stat(name) for name in names]),
            "read": measured(lambda: [Path(name).read_bytes() for name in names]),
        }
    found["ratio"] = {key: found["guard"]["cpu_s"] / max(found[key]["cpu_s"], 1e-9) for key in ("stat", "read")}
    out = Path(__file__).parents[2] / ".bench"
    out.mkdir(exist_ok=True)
    (out / "guard.json").write_text(json.dumps({"files": len(names), **found}, indent=2) + "\n")
    print(f"{len(names)} files: the guard's decision takes {found['guard']['cpu_s']:.3f} s of CPU, {found['ratio']['stat']:.1f} x listing "
          f"their sizes, {found['ratio']['read']:.2f} x reading them ({args.payload_kib} KiB each)")  # fmt: skip


if __name__ == "__main__":
    main()
