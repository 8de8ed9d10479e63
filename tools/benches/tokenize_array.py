"""An array on a real Slurm: three tasks killed at random moments, a node lost, run again; the bytes
of one process at the end."""

# tools/bench tokenize_array [--corpus sft.jsonl] [--model M] [--tasks 16] [--seed 1]

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# tools/benches/tokenize.py, for its corpus and models; by its path, as the standard library has a
# module of that name.
_spec = importlib.util.spec_from_file_location(
    "bench_tokenize", Path(__file__).with_name("tokenize.py")
)
assert _spec and _spec.loader
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

ACCOUNT = "project_465000000"
Environ = dict[str, str]


def sh(environ: Environ, *argv: str) -> str:
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False).stdout


def running(environ: Environ) -> list[tuple[str, str]]:
    """(array task, node) of what runs now."""
    lines = sh(environ, "squeue", "-h", "-r", "-t", "R", "-o", "%i %N").splitlines()
    return [(job, node) for job, node in map(str.split, lines) if "_" in job]


def disturb(
    first: subprocess.Popen[str], environ: Environ, rng: random.Random, say: Any
) -> tuple[list[str], str]:
    """Kill three tasks, each after a random pause, then set the node of another one down for two
    seconds."""
    killed: list[str] = []
    node = ""
    while first.poll() is None and not node:
        tasks = [one for one in running(environ) if one[0] not in killed]
        if not tasks:
            time.sleep(0.2)
            continue
        time.sleep(2 * rng.random())
        job, where = rng.choice(tasks)
        if len(killed) < 3:
            if (job, where) in running(environ):
                sh(environ, "scancel", "--signal=KILL", job)
                killed.append(job)
                say(f"killed {job} on {where}")
        else:
            node = where
            say(
                f"{node} down, with {sum(one[1] == node for one in running(environ))} running tasks"
            )
            sh(environ, "scontrol", "update", f"nodename={node}", "state=down", "reason=bench")
            time.sleep(2)
            sh(environ, "scontrol", "update", f"nodename={node}", "state=resume")
    return killed, node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", help="JSONL [default: built from Debian packages]")
    parser.add_argument("--mb", type=float, default=130)
    parser.add_argument("--model", default="bpe32k_identity", help="one of tools/bench tokenize's")
    parser.add_argument("--work", help="where data and models are kept between runs")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    args = parser.parse_args()
    work = Path(args.work or Path(tempfile.gettempdir()) / f"hpctrain-bench-{os.getuid()}")
    work.mkdir(parents=True, exist_ok=True)
    data = bench.corpus(args.corpus, args.mb, work)
    model = bench.train(data, work, [args.model])[args.model]
    seed = args.seed or random.randrange(1, 1 << 30)
    with tempfile.TemporaryDirectory(prefix="array-", dir=work) as folder:
        print(json.dumps(measure(data, model, Path(folder), args.tasks, seed), indent=1))


def measure(data: Path, model: Path, out: Path, tasks: int, seed: int) -> dict[str, Any]:
    from hpctrain.config.site import load_site
    from hpctrain.sandbox import sandbox
    from hpctrain.sandbox.from_site import shape_from_site

    shape = shape_from_site(
        load_site("lumi"),
        {"lumi-g": 1, "lumi-c": 4, "lumi-d": 0},
        kill_wait_s=3,
        slurmd_timeout_s=60,
    )
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        status, _ = sandbox.up(shape, "array", out / "sandbox", os.environ, source="unpacked")
        assert status.record is not None
        environ = dict(sandbox.shell_environ(status.record, os.environ))
        say(f"sandbox up; seed {seed}")
        argv = [
            *bench.tokenize(data, model, out / "array")[:-2],
            "--tasks",
            str(tasks),
            "--site",
            "lumi",
            "--account",
            ACCOUNT,
        ]
        with (out / "log").open("w") as log:
            first = subprocess.Popen(argv, env=environ, stdout=log, stderr=log, text=True)
            killed, node = disturb(first, environ, random.Random(seed), say)
            code = first.wait()
        say(
            f"the first run ended with {code}:"
            f" {(out / 'log').read_text().strip().splitlines()[-2:]}"
        )
        done = len(list((out / "array.tokenize").glob("*-[0-9]*.json")))
        say(f"{done} of {tasks} shards done; running the same command again")
        again = subprocess.run(
            [*argv, "--json"], env=environ, capture_output=True, text=True, check=False
        )
        if again.returncode:
            raise SystemExit(f"the second run ended with {again.returncode}\n{again.stderr}")
        answer = json.loads(again.stdout)
        say(
            f"done: {answer['manifest']['documents']} documents, {answer['manifest']['tokens']}"
            " tokens"
        )
    finally:
        sandbox.down("array", out / "sandbox", os.environ)
    subprocess.run([*bench.tokenize(data, model, out / "one")], check=True, capture_output=True)
    pairs = {
        name: [_sha256(out / f"{name}_text_document{end}") for end in (".bin", ".idx")]
        for name in ("array", "one")
    }
    say(
        "the same bytes as one process"
        if pairs["array"] == pairs["one"]
        else "OTHER BYTES THAN ONE PROCESS"
    )
    verified = subprocess.run(
        [sys.executable, "-m", "hpctrain", "data", "verify", str(out / "array_text_document")],
        capture_output=True,
        check=False,
    )
    return {
        "megabytes": round(data.stat().st_size / 1e6, 1),
        "tasks": tasks,
        "seed": seed,
        "killed": killed,
        "node_down": node,
        "first_exit_code": code,
        "shards_done_before_rerun": answer["shards_done_before"],
        "array_tasks_of_rerun": answer["array_tasks"],
        "documents": answer["manifest"]["documents"],
        "tokens": answer["manifest"]["tokens"],
        "sha256": pairs,
        "same": pairs["array"] == pairs["one"],
        "verify_exit_code": verified.returncode,
        "wall_s": round(time.monotonic() - started, 1),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


if __name__ == "__main__":
    main()
