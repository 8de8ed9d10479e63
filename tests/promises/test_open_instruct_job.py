"""The rendered job of the open-instruct recipes, run as it is on two pretended nodes: killed in a
save, resumed, exported, done.

What stands for `python` behaves as accelerate's launcher and finetune.py do with checkpoints: it
takes up the greatest folder with the marker COMPLETED, and writes the marker into the greatest
folder there is, whole or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import run_files

sys.path.insert(0, str(Path(__file__).parents[1] / "standin"))
import checkpoints  # noqa: E402

FAKES = Path(__file__).parents[1] / "fakes" / "bin"
SRUN = """#!{python}
import os, subprocess, sys
rest = sys.argv[1:]
while rest[0].startswith("--"):
    rest.pop(0)
tasks = [subprocess.Popen(rest, env=dict(os.environ, SLURM_PROCID=n, SLURM_LOCALID="0", SLURM_NODEID=n, SLURMD_NODENAME="n" + n)) for n in "01"]
sys.exit(max(task.wait() for task in tasks))
"""
PROGRAM = """#!{python}
import json, os, sys
words = sys.argv[1:]
node = words[words.index("--machine_rank") + 1]
with open(os.path.join({folder!r}, "argv-" + node + ".jsonl"), "a") as out:
    keep = ("MASTER_ADDR", "HF_HOME", "HF_HUB_OFFLINE", "HPCTRAIN_MODE")
    out.write(json.dumps([words, {{name: os.environ[name] for name in keep}}]) + "\\n")
if node != "0":
    sys.exit(0)
value = lambda flag: words[words.index(flag) + 1]
out, torch = value("--output_dir"), open({torch!r}, "rb").read()
steps, every = int(value("--max_train_steps")), int(value("--checkpointing_steps"))
names = [name for name in os.listdir(out) if name.startswith("step_")]
whole = [int(name[5:]) for name in names if os.path.exists(os.path.join(out, name, "COMPLETED"))]
step = max(whole + [0])
print("Resumed from checkpoint: step_%d" % step if step else "starts", flush=True)
end = open({end!r}).read().strip()
while step < steps:
    step += every
    folder = os.path.join(out, "step_%d" % step)
    os.makedirs(folder, exist_ok=True)
    for name in ("pytorch_model.bin", "optimizer.bin", "random_states_0.pkl"):
        open(os.path.join(folder, name), "wb").write(torch)
        if end == "kill in save %d" % step:
            os._exit(9)
    last = max((name for name in os.listdir(out) if name.startswith("step_")), key=lambda name: int(name[5:]))
    open(os.path.join(out, last, "COMPLETED"), "w").write("COMPLETED")
if end == "kill before export":
    os._exit(9)
for name in ("pytorch_model.bin", "tokenizer_config.json"):
    open(os.path.join(out, name), "wb").write(torch)
"""


class Bench:
    """A rendered run on a pretended Slurm, with a hub cache, a git working copy and a program that
    says how it ends."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.root, self.folder, self.ckpt = root, root / "run", root / "ckpt"
        self.checkout = root / "it's $(touch canary)" / "open-instruct"
        hub = root / "hf" / "hub" / "models--org--base"
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            write(hub / "snapshots" / ("c" * 40) / name, "x")
        write(hub / "refs" / "main", "c" * 40)
        write(root / "sft data.jsonl", "{}\n")
        write(self.checkout / "open_instruct" / "finetune.py", "")
        git(self.checkout, "init", "-q")
        git(self.checkout, "add", ".")
        git(self.checkout, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x")
        self.commit = git(self.checkout, "rev-parse", "HEAD").strip()
        run = {
            "name": "tulu",
            "site": "local",
            "recipe": "open-instruct-sft",
            "nodes": 2,
            "time": "10m",
            "chain": {"jobs": 4},
            "checkpoint": {"dir": str(self.ckpt)},
            "data": {"train": [str(root / "sft data.jsonl")]},
            "config": {
                "max_train_steps": 6,
                "checkpointing_steps": 2,
                "chat_template_name": "tulu",
                **config,
            },
            "recipe_options": {
                "dir": str(self.checkout),
                "commit": self.commit[:12],
                "model": "org/base",
                "deepspeed": "none",
                "hf_home": str(root / "hf"),
                "processes_per_node": 4,
                "python": str(root / "python program"),
            },
        }
        write(root / "run.yaml", yaml.safe_dump(run))
        loaded = load_plan(str(root / "run.yaml"), (), str(self.folder))
        assert loaded.plan.errors == []
        for name, content in run_files(loaded).items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        (self.folder / "logs").mkdir(exist_ok=True)
        (root / "torch.bin").write_bytes(checkpoints.torch_file({"a": 1}))
        program = PROGRAM.format(
            python=sys.executable,
            folder=str(root),
            torch=str(root / "torch.bin"),
            end=str(root / "end"),
        )
        for path, text in (
            (root / "python program", program),
            (root / "bin" / "srun", SRUN.format(python=sys.executable)),
        ):
            write(path, text)
            path.chmod(0o755)

    def link(self, number: int, end: str = "") -> tuple[int, str]:
        """One job, its program ending as told: (exit code, what the job said)."""
        write(self.root / "end", end)
        env = {
            "PATH": f"{self.root}/bin:{FAKES}:{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "HOME": str(self.root),
            "USER": "someone",
            "FAKE_LOG": str(self.root / "fake.log"),
            "SLURM_JOB_ID": str(100 + number),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n0,n1",
            "SLURM_NTASKS": "2",
        }
        done = subprocess.run(
            ["bash", str(self.folder / "job.sbatch"), str(number)],
            env=env,
            text=True,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout

    def starts(self, node: int) -> list[Any]:
        path = self.root / f"argv-{node}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def modes(self) -> list[str]:
        records = [
            json.loads(line) for line in (self.folder / "links.jsonl").read_text().splitlines()
        ]
        return [record["mode"] for record in records if record["event"] == "begin"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def git(folder: Path, *words: str) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    return subprocess.run(
        ["git", "-C", str(folder), *words], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_a_chain_survives_a_kill_in_a_save_and_one_before_the_export(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.link(1, "kill in save 4")
    assert (bench.ckpt / "step_4").exists() and not (bench.ckpt / "step_4" / "COMPLETED").exists()
    second = bench.link(2, "kill before export")
    third, fourth = bench.link(3), bench.link(4)

    assert first[0] == 9 and second[0] == 9 and third[0] == fourth[0] == 0, third[1] + fourth[1]
    assert bench.modes() == ["scratch", "resume", "resume", "done"]
    assert "Resumed from checkpoint: step_2" in second[1] and "interrupted-step_4`" in second[1]
    assert (
        "the model is not exported yet" in third[1]
        and "Resumed from checkpoint: step_6" in third[1]
    )
    aside = bench.ckpt.with_name(bench.ckpt.name + ".hpctrain") / "interrupted-step_4"
    assert sorted(path.name for path in aside.iterdir()) == ["pytorch_model.bin"]
    assert not list(tmp_path.rglob("canary"))


def test_every_node_starts_one_launcher_that_knows_its_number(tmp_path: Path) -> None:
    bench = Bench(tmp_path, exp_name="-it's $(touch canary)")
    code, said = bench.link(1)
    (zero, environ), (one, _) = bench.starts(0)[0], bench.starts(1)[0]

    assert code == 0, said
    assert zero[:9] == [
        "-u",
        "-m",
        "accelerate.commands.launch",
        "--machine_rank",
        "0",
        "--main_process_ip",
        "n0",
        "--main_process_port",
        str(20000 + 101),
    ]
    assert one[4] == "1" and zero[:4] + zero[5:] == one[:4] + one[5:]
    assert zero[9:20] == [
        "--num_machines",
        "2",
        "--num_processes",
        "8",
        "--rdzv_backend",
        "static",
        "--mixed_precision",
        "bf16",
        "--dynamo_backend",
        "no",
        "--multi_gpu",
    ]
    assert "--exp_name=-it's $(touch canary)" in zero and zero[-2] == "--dataset_local_cache_dir"
    assert os.path.dirname(zero[-1]) == str(tmp_path / "open-instruct-cache" / "datasets")
    assert environ == {
        "MASTER_ADDR": "n0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HPCTRAIN_MODE": "scratch",
    }
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("fault", ["commit", "no git", "model", "data", "defaults"])
def test_what_is_not_as_planned_stops_the_job_before_the_gpus_start(
    tmp_path: Path, fault: str
) -> None:
    bench = Bench(tmp_path)
    if fault == "commit":
        git(
            bench.checkout,
            "-c",
            "user.name=x",
            "-c",
            "user.email=x@x",
            "commit",
            "-qm",
            "y",
            "--allow-empty",
        )
        words = "and the run was planned for " + bench.commit[:12]
    elif fault == "no git":
        (bench.checkout / ".git").rename(bench.checkout / "git")
        words = "is no git working copy"
    elif fault == "model":
        (tmp_path / "hf/hub/models--org--base/refs/main").unlink()
        words = "models--org--base/refs/main"
    elif fault == "data":
        (tmp_path / "sft data.jsonl").unlink()
        words = "sft data.jsonl"
    else:
        write(tmp_path / "hf/accelerate/default_config.yaml", "")
        words = "accelerate would take settings from"
    code, said = bench.link(1)

    assert code == 1 and words in said, said
    assert bench.starts(0) == bench.starts(1) == []


def test_a_changed_working_copy_is_said(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    write(bench.checkout / "open_instruct" / "finetune.py", "changed")
    code, said = bench.link(1)

    assert code == 0 and "differ from the commit:  M open_instruct/finetune.py" in said
