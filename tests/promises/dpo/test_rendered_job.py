"""The rendered job of the recipe dpo, run as it is: it trains, a second link resumes to the target,
a third knows it is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import run_files

from .conftest import Bench

SRUN = """#!{python}
import os, signal, subprocess, sys
rest = sys.argv[1:]
while rest[0].startswith("--"):
    rest.pop(0)
env = dict(os.environ, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURMD_NODENAME="nid000001")
task = subprocess.Popen(rest, env=env, start_new_session=True)
signal.signal(signal.SIGUSR1, lambda number, frame: os.killpg(task.pid, number))  # as slurmstepd does to a whole task
sys.exit(task.wait())
"""
FAKES = Path(__file__).parents[2] / "fakes" / "bin"


def test_three_links_of_a_chain(bench: Bench, tmp_path: Path) -> None:
    run = {
        "name": "pref",
        "site": "local",
        "recipe": "dpo",
        "nodes": 1,
        "tasks_per_node": 1,
        "time": "10m",
        "checkpoint": {"dir": str(tmp_path / "ckpt")},
        "data": {"train": [str(bench.path / "pairs.jsonl")]},
        "recipe_options": {"python": sys.executable},
        "chain": {"jobs": 3},
        "config": {
            "policy_name": str(bench.path / "policy"),
            "precision": "fp32",
            "dpo_training": {
                "batch_size": 4,
                "max_steps": 40,
                "save_steps": 1000,
                "log_steps": 1,
                "learning_rate": 1e-3,
            },
        },
    }
    folder = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    loaded = load_plan(str(tmp_path / "run.yaml"), (), str(folder))
    assert loaded.plan.errors == []
    for name, content in run_files(loaded).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "logs").mkdir(exist_ok=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "bin" / "srun").chmod(0o755)
    env = {
        "PATH": f"{tmp_path}/bin:{FAKES}:{os.path.dirname(sys.executable)}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "USER": "someone",
        "FAKE_LOG": str(tmp_path / "fake.log"),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "nid000001",
        "SLURM_NTASKS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    links = []
    for link in (1, 2, 3):
        job = subprocess.Popen(
            ["bash", str(folder / "job.sbatch"), str(link)],
            env={**env, "SLURM_JOB_ID": str(100 + link)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if link == 1:
            deadline = time.monotonic() + 300
            while (
                not (folder / "metrics.jsonl").is_file()
                or (folder / "metrics.jsonl").stat().st_size == 0
            ):
                assert job.poll() is None and time.monotonic() < deadline, job.communicate()
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=400)
        assert job.returncode == 0, said
        links.append(said)
        records = [json.loads(line) for line in (folder / "links.jsonl").read_text().splitlines()]
    assert "stopped by signal USR1: saved at iteration" in links[0]
    modes = [record["mode"] for record in records if record["event"] == "begin"]
    assert modes == ["scratch", "resume", "done"]
    assert (tmp_path / "ckpt" / "latest").read_text() == "step-40"
    assert (folder / "dpo_model" / "model.safetensors").is_file()
