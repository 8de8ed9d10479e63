"""How fast hpctrain starts: CPU time against `python -c "import click"`, and files opened, on the
way to --help and render."""

# extras: dev

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# The promises: CPU time as a multiple of the baseline's, and successful opens.
LIMITS = {"help": (1.5, 150), "render": (4.0, 350)}
RUN = """\
name: bench
site: lumi
recipe: neox-sft
account: project_465000000
partition: standard-g
nodes: {nodes}
time: 20h
container: /scratch/project_465000000/containers/image.sif
checkpoint: {{dir: /scratch/project_465000000/bench}}
data: {{train: [/scratch/project_465000000/data/sft_text_document]}}
chain: {{jobs: 5}}
config:
  train_micro_batch_size_per_gpu: 1
  train_iters: 1000
  checkpoint_factor: 100
  num_layers: 24
  hidden_size: 1024
  num_attention_heads: 16
  seq_length: 2048
  max_position_embeddings: 2048
  tokenizer_type: SPMTokenizer
  vocab_file: /scratch/project_465000000/model.model
  optimizer: {{type: Adam, params: {{lr: 8.0e-6, betas: [0.9, 0.95], eps: 1.0e-8}}}}
recipe_options: {{dir: /project/project_465000000/gpt-neox}}
"""


def main() -> int:
    """Print the table, write .bench/startup.json, exit 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=15, help="interleaved measurements of each command"
    )
    rounds = parser.parse_args().rounds
    program = shutil.which("hpctrain")
    assert program, "hpctrain is not on PATH; run this with tools/bench startup"
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import click": [sys.executable, "-c", "import click"],
            "help": [program, "--help"],
        }
        for name, nodes in (("render", 192), ("render 3,000", 3000)):
            path = Path(folder, f"{nodes}", "run.yaml")
            path.parent.mkdir()
            path.write_text(
                RUN.format(nodes=nodes).replace(
                    "standard-g", "standard-g" if nodes < 1024 else "big"
                )
            )
            commands[name] = [
                program,
                "render",
                str(path),
                "-o",
                f"{folder}/out-{nodes}",
                "--force",
            ]
        _profile_for_3000(Path(folder, "3000", "run.yaml"))
        # As installed: every module compiled beforehand, hpctrain's too, which a checkout's may not
        # be.
        environment = {
            **os.environ,
            "HPCTRAIN_NO_USER_CONFIG": "1",
            "PYTHONPYCACHEPREFIX": f"{folder}/pyc",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for argv in commands.values():
            _cpu_s(argv, environment)  # warms the page cache and the .pyc files
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, argv in commands.items():
                times[name].append(_cpu_s(argv, environment))
        opens = {name: _count_opens(argv, environment) for name, argv in commands.items()}
    base = statistics.median(times["import click"])
    rows = []
    for name, values in times.items():
        # The ratio within each round, so that a busy machine slows both alike.
        ratio = statistics.median(
            value / reference for value, reference in zip(values, times["import click"])
        )
        limits = LIMITS.get(name.split()[0], (None, None))
        broken = [
            limits[0] is not None and ratio > limits[0],
            limits[1] is not None and (opens[name] or 0) > limits[1],
        ]
        rows.append(
            {
                "what": name,
                "cpu_s": statistics.median(values),
                "ratio": ratio,
                "opens": opens[name],
                "max_ratio": limits[0],
                "max_opens": limits[1],
                "ok": not any(broken),
            }
        )
    same = statistics.median(a / b for a, b in zip(times["render 3,000"], times["render"]))
    print(f"{'':14} {'CPU ms':>8} {'x click':>8} {'at most':>8} {'opens':>6} {'at most':>8}")
    for row in rows:
        print(
            f"{row['what']:14} {row['cpu_s'] * 1000:8.1f} {row['ratio']:8.2f}"
            f" {row['max_ratio'] or '':>8} {'?' if row['opens'] is None else row['opens']:>6}"
            f" {row['max_opens'] or '':>8}  {'' if row['ok'] else 'BROKEN'}"
        )
    print(
        f"3,000 nodes against 192: {same:.2f} x the CPU time; baseline {base * 1000:.1f} ms; median"
        f" of {rounds} interleaved rounds"
    )
    report = Path(__file__).parents[2] / ".bench" / "startup.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text(
        json.dumps({"rows": rows, "nodes_3000_to_192": same, "rounds": rounds}, indent=2) + "\n"
    )
    return 0 if all(row["ok"] for row in rows) and same < 1.15 else 1


def _profile_for_3000(run_yaml: Path) -> None:
    """LUMI has no partition of 3,000 nodes; a profile laid over it has."""
    profile = run_yaml.parent / "site.yaml"
    profile.write_text(
        "name: lumi-big\nextends: lumi\npartitions:\n  big: {node_type: lumi-g, whole_nodes: true,"
        " max_nodes: 4000}\n"
    )
    run_yaml.write_text(run_yaml.read_text().replace("site: lumi\n", "site: ./site.yaml\n"))


def _cpu_s(argv: Sequence[str], environment: dict[str, str]) -> float:
    """User and system CPU seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _count_opens(argv: Sequence[str], environment: dict[str, str]) -> int | None:
    """Files opened with success, by strace; None where there is no strace."""
    if not shutil.which("strace"):
        print("no strace: opens are not counted (apt-get install strace)", file=sys.stderr)
        return None
    with tempfile.NamedTemporaryFile("r") as log:
        subprocess.run(
            ["strace", "-f", "-e", "trace=open,openat", "-o", log.name, *argv],
            env=environment,
            capture_output=True,
            check=True,
        )
        return sum(bool(re.search(r"\bopen(at)?\(.*\)\s+=\s+\d+", line)) for line in log)


if __name__ == "__main__":
    sys.exit(main())
