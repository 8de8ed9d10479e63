"""`launch:` on a real Slurm, two nodes with two processes each: ranks, rendezvous, the first rank to
fail, and a killed run that ends like an undisturbed one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from needed import needed

pytestmark = pytest.mark.slurm
HPCTRAIN = [sys.executable, "-m", "hpctrain"]
PROGRAM = Path(__file__).parents[1] / "standin" / "launched.py"


def started(sandbox, top: Path, launch: str, jobs: int, *more: object) -> Path:
    """A chain of the training by a launcher, waited for; its checkpoint folder."""
    needed("torch" if launch == "torchrun" else launch)
    framework = "accelerate" if launch == "accelerate" else "ddp"
    top.mkdir()
    # At most twelve lines of a person's.
    (top / "run.yaml").write_text(f"""\
name: job
site: lumi
recipe: command
account: project_465000000
partition: standard-g
nodes: 2
time: "5:00"
checkpoint: {{dir: ck}}
chain: {{jobs: {jobs}}}
recipe_options: {{launch: {launch}, processes_per_node: 2, python: {json.dumps(sys.executable)},
  program: [{PROGRAM}, {framework}, --dir, ck, --steps, 6, --save-every, 2{"".join(f", {word}" for word in more)}],
  layout: {{pattern: "ckpt_{{iteration}}", marker: DONE, files: [state.pt]}}, target_iteration: 6}}
env: {{GLOO_SOCKET_IFNAME: lo, CUDA_VISIBLE_DEVICES: ""}}
""")
    sandbox.ok(*HPCTRAIN, "chain", "--yes", cwd=top)
    try:
        sandbox.wait_for(lambda: not sandbox.ok("squeue", "-h").strip(), 200)
    except AssertionError as error:
        raise AssertionError(logs(top / "ck")) from error
    return top / "ck"


def logs(folder: Path) -> str:
    paths = sorted((folder.parent / "runs/job/logs").glob("*.out"))
    return "\n".join(path.read_text() for path in paths)


@pytest.mark.parametrize("launch", ["torchrun", "accelerate", "deepspeed"])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one_and_tells_the_rank(
    idle, tmp_path, launch
):
    calm = started(idle, tmp_path / "calm", launch, 1)
    killed = started(
        idle, tmp_path / "killed", launch, 2, "--die-at", 4, "--die-rank", 3, "--how", 7
    )
    ends = {path.read_text() for folder in (calm, killed) for path in folder.glob("end-*")}
    said = logs(killed)
    starts = [
        json.loads(line)
        for rank in range(4)
        for line in (killed / f"starts-{rank}").read_text().splitlines()
    ]

    assert len(ends) == 1 and len(list(calm.glob("end-*"))) == 4, logs(calm) + said
    assert [start["first"] for start in starts] == [0, 2] * 4
    assert [int(start["RANK"]) for start in starts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {start["WORLD_SIZE"] for start in starts} == {"4"}
    assert len({start["node"] for start in starts[:4]}) == 1 != len({s["node"] for s in starts})
    node = starts[-1]["node"]
    if launch == "deepspeed":
        assert f"the first launcher to fail was that of {node}, with exit code 7" in said
    else:
        assert f"the first task to fail was rank 3 on {node}, with exit code 7" in said


def test_ray_spans_the_nodes_and_the_program_runs_once(idle, tmp_path):
    """The stand-in for Ray starts and joins as Ray does; the real one is run by tools/prove-verl."""
    (tmp_path / "drive.py").write_text(
        "import os, sys\n"
        "open('ran', 'a').write(os.environ['SLURM_NODEID'] + ' ' + os.environ['RAY_ADDRESS'] + '\\n')\n"
        "sys.exit(5)\n"
    )
    (tmp_path / "run.yaml").write_text(f"""\
name: job
site: lumi
recipe: command
account: project_465000000
partition: standard-g
nodes: 2
time: "5:00"
recipe_options: {{launch: ray, program: drive.py, python: {json.dumps(sys.executable)}, ray_timeout_s: 60}}
env: {{PYTHONPATH: {PROGRAM.parent / "ray"}, RAY_STANDIN_LOG: {tmp_path / "ray.jsonl"}, STRAY_MARK: launch}}
""")
    idle.ok(*HPCTRAIN, "chain", "--yes", cwd=tmp_path)
    idle.wait_for(lambda: not idle.ok("squeue", "-h").strip(), 150)
    said = logs(tmp_path / "ck")
    assert (tmp_path / "ran").exists(), said
    (ran,) = (tmp_path / "ran").read_text().splitlines()

    assert ran.startswith("0 ") and ran.split(":")[-1].isdigit(), said
    assert "with exit code 5" in said and "finished rc=5" in said
