"""The seed's LUMI job, with one thing broken at a time, is caught by a rehearsal on a real Slurm;
the right one passes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
pytestmark = pytest.mark.slurm
EXAMPLES = Path(__file__).parents[2] / "examples" / "lumi-neox-sft"
ACCOUNT = "project_465001281"


@pytest.fixture
def run(tmp_path):
    """The example's run, two nodes of it, in a folder of its own; `rehearse(...)` gives its JSON
    and the process."""
    folder = tmp_path / "my run"
    shutil.copytree(EXAMPLES, folder)
    return Run(folder, tmp_path)


class Run:
    def __init__(self, folder: Path, top: Path) -> None:
        self.folder, self.top, self.base = folder, top, top / "rehearsal"

    def hpctrain(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hpctrain", *map(str, words)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def rehearse(self, *words: str, code: int = 0, nodes: int = 2) -> dict:
        done = self.hpctrain(
            "rehearse",
            "--json",
            "--nodes",
            str(nodes),
            "--speed",
            "100000",
            "--dir",
            str(self.base),
            *words,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr
        answer = json.loads(done.stdout)
        answer["said"] = "\n".join(
            f"{p['what']}\n{p['why']}" for p in answer["problems"] if p["level"] == "error"
        )
        assert not self.base.exists() and not (self.folder / "runs").exists()
        return answer

    def job(self, *pairs: tuple[str, str], nodes: int = 2) -> str:
        """The rendered job script with texts replaced, as somebody would edit it."""
        done = self.hpctrain("render", "--set", f"nodes={nodes}")
        assert done.returncode == 0, done.stderr
        text = (self.folder / "runs" / "ft_latest_7" / "job.sbatch").read_text()
        shutil.rmtree(self.folder / "runs")
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        path = self.top / "edited.sbatch"
        path.write_text(text)
        return str(path)


def test_the_right_job_passes_unchanged_and_every_rank_saw_what_was_planned(run):
    answer = run.rehearse("--no-accounting")
    assert answer["problems"] == [] and answer["refused"] is None
    ranks = sorted(answer["ranks"], key=lambda task: int(task["RANK"]))
    assert [int(task["RANK"]) for task in ranks] == list(range(16))
    assert {task["MASTER_ADDR"] for task in ranks} == {"nid000001"} and {
        task["PWD"] for task in ranks
    } == {f"/project/{ACCOUNT}/IP/llm-gpt-neox"}
    assert [bar["mode"] for bar in answer["timeline"]] == ["finetune"] and answer["timeline"][0][
        "kept"
    ] == 423858 + 1337
    # The script that ran is the very one that `render` writes.
    run.hpctrain("render", "--set", "nodes=2")
    rendered = (run.folder / "runs" / "ft_latest_7" / "job.sbatch").read_bytes()
    assert hashlib.sha256(rendered).hexdigest() == answer["job_script_sha256"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--set", "account=project_465009999", "--account-exists", ACCOUNT],
            "Invalid account or account/partition combination",
        ),
        (
            ["--set", "time=80:00:00", "--no-check", "--no-accounting"],
            "Requested time limit is invalid",
        ),
        (
            ["--set", "partition=dev-g", "--set", "time=1:00:00", "--jobs", "3", "--no-check"],
            "QOSMaxSubmitJobPerUserLimit",
        ),
    ],
    ids=["account", "time", "third-dev-g"],
)
def test_what_the_sites_limits_refuse_is_told_in_slurms_words(run, words, told):
    answer = run.rehearse(*words, code=1)
    assert told in answer["said"] and told in answer["refused"] and answer["ranks"] == []


def test_more_cores_than_jobs_may_have_are_refused(run):
    answer = run.rehearse(
        "--set", "sbatch.cpus-per-task=8", "--no-check", "--no-accounting", code=1
    )
    assert (
        "Requested node configuration is not available" in answer["said"]
        and "56 cores" in answer["said"]
    )


def test_without_no_check_hpctrain_itself_refuses_first(run):
    done = run.hpctrain("rehearse", "--set", "time=80:00:00", "--dir", run.base)
    assert done.returncode == 2 and "longer than partition" in done.stderr and not run.base.exists()


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ([("--bind /pfs --bind /scratch ", "")], [f"/scratch/{ACCOUNT}"]),
        (
            [
                (
                    'LOCAL_RANK="$SLURM_LOCALID"',
                    'LOCAL_RANK="$SLURM_LOCALID" ROCR_VISIBLE_DEVICES="$((SLURM_LOCALID / 2))"',
                )
            ],
            ["share GPU 0 of node nid000001"],
        ),
        (
            [
                ('RANK="$SLURM_PROCID"', "RANK=0"),
                ("0xfe000000000000,0xfe00000000000000", "0xfe00000000000000,0xfe000000000000"),
            ],
            ["not every rank is there exactly once", "another CPU mask than planned"],
        ),
    ],
    ids=["bind", "gpu", "rank-and-mask"],
)
def test_a_broken_step_is_caught(run, edits, told):
    answer = run.rehearse("--job", run.job(*edits), "--no-accounting", code=1)
    for words in told:
        assert words in answer["said"], answer["problems"]


def deepy(run) -> list[str]:
    text = (run.folder / "run.yaml").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("container:"))
    text = text.replace(
        "  flavor:", "  launch: deepy\n  activate: /project/project_465001281/env.sh\n  flavor:"
    )
    (run.folder / "run.yaml").write_text(text)
    return ["--no-accounting"]


def test_neoxs_own_launcher_passes_and_a_wrong_hostfile_is_caught(run):
    options = deepy(run)
    answer = run.rehearse(*options)
    assert answer["problems"] == [] and len(answer["ranks"]) == 16
    again = run.job(
        (
            "| sed 's/$/ slots=8/' >\"$DLTS_HOSTFILE\"",
            '| sed \'s/$/ slots=8/\' | tee -a "$DLTS_HOSTFILE" >>"$DLTS_HOSTFILE"',
        )
    )
    assert "multiple entries for nid00000" in run.rehearse(*options, "--job", again, code=1)["said"]


def test_a_chain_under_faults_resumes_each_time_from_the_newest_whole_checkpoint(run):
    picture = run.top / "chain.svg"
    (run.folder / "bench.sh").write_text(
        '#!/bin/bash\n#SBATCH -p small -t 5\n[ "$HPCTRAIN_LINK" -gt 1 ] && [ -d'
        ' "$HPCTRAIN_CHECKPOINT" ]\n'
    )
    answer = run.rehearse(
        "--faults",
        "kill_mid_save,node_fail,timeout",
        "--jobs",
        "4",
        "--picture",
        picture,
        "--no-accounting",
        "--set",
        "chain.after_each=bench.sh",
        nodes=1,
    )
    side = {link: answer["states"][job_id] for link, job_id in answer["side_jobs"].items()}
    assert side == {"1": "FAILED", "2": "COMPLETED", "3": "COMPLETED", "4": "COMPLETED"}
    assert [p["level"] for p in answer["problems"] if "side job after link 1" in p["what"]] == [
        "warning"
    ]
    bars = answer["timeline"]
    assert [bar["outcome"] for bar in bars] == [
        "killed in a save",
        "node failed",
        "time limit",
        "done",
        "done",
    ]
    assert [bar["restart"] for bar in bars] == [0, 0, 1, 0, 0]
    ran = [bar for bar in bars if bar["took_s"]]
    assert [bar["mode"] for bar in ran] == ["finetune", *["resume"] * (len(ran) - 1)]
    assert all(later["first"] == bar["kept"] for bar, later in zip(ran, ran[1:]))
    assert (
        ran[-1]["kept"] == 423858 + 1337
        and answer["lost_iterations"] == sum(bar["lost"] for bar in ran) > 0
    )
    assert picture.read_text().startswith("<svg")


def test_a_tokenize_array_is_played_on_the_head_of_its_data(run):
    from tokenize_help import dialogues, model_path, write_jsonl

    data = write_jsonl(run.top / "data.jsonl", dialogues(50))
    argv = [
        "--tokenizer",
        model_path("bpe_nmt_nfkc"),
        "--output-prefix",
        str(run.top / "out"),
        "--tasks",
        "2",
        "--site",
        "lumi",
        "--account",
        ACCOUNT,
        "--container",
        f"/scratch/{ACCOUNT}/image.sif",
        "--rehearse",
        "--json",
    ]
    done = run.hpctrain("tokenize", str(data), *argv)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (
        answer["ok"]
        and answer["same_bytes"]
        and answer["documents"] == 50
        and answer["partition"] == "small"
    )
    assert answer["states"] == {"COMPLETED": 3} and not list(run.top.glob("out*"))


def pipeline(run, *words: str, code: int = 0) -> dict:
    path = EXAMPLES.parent / "lumi-neox-stages" / "pipeline.yaml"
    done = run.hpctrain(
        "rehearse",
        str(path),
        "--json",
        "--no-accounting",
        "--nodes",
        "1",
        "--speed",
        "100000",
        "--dir",
        str(run.base),
        "-o",
        str(run.top / "runs"),
        *words,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr
    assert not run.base.exists() and not (run.top / "runs").exists()
    return json.loads(done.stdout)


def test_a_pipelines_stages_wait_for_each_other_and_hand_on_what_they_made(run):
    picture = run.top / "stages.svg"
    answer = pipeline(run, "--faults", "translate:kill_mid_save", "--picture", str(picture))
    assert [(stage["stage"], stage["from"], stage["problems"]) for stage in answer["stages"]] == [
        ("translate", None, []),
        ("instruct", "translate", []),
    ]
    first, second = (
        [bar for bar in stage["timeline"] if bar["took_s"]] for stage in answer["stages"]
    )
    assert [(bar["mode"], bar["outcome"]) for bar in first] == [
        ("finetune", "killed in a save"),
        ("resume", "done"),
    ]
    # The second stage begins at the very checkpoint that the first one's jobs made, and after it.
    assert [(bar["mode"], bar["first"], bar["kept"]) for bar in second] == [
        ("finetune", first[-1]["kept"], first[-1]["kept"] + 400)
    ]
    assert (
        second[0]["start_s"] == first[-1]["start_s"] + first[-1]["took_s"]
        and "instruct link 1" in picture.read_text()
    )
    assert all(
        len(stage["ranks"]) == 8 * len(own) for stage, own in zip(answer["stages"], (first, second))
    )


def test_a_stage_that_does_not_reach_its_target_is_told_by_the_one_that_waits_for_it(run):
    answer = pipeline(
        run,
        "--set",
        "translate.estimate.step_time_s=300",
        "--set",
        "translate.chain.jobs=1",
        code=1,
    )
    (told,) = [
        p["what"] for stage in answer["stages"] for p in stage["problems"] if p["level"] == "error"
    ]
    assert told.startswith(
        "stage `instruct`: link 1 gives up: stage `translate` is at 424058 and its target is 425195"
    )
    assert answer["stages"][1]["ranks"] == []


def test_ctrl_c_leaves_nothing(run):
    argv = [
        sys.executable,
        "-m",
        "hpctrain",
        "rehearse",
        "--nodes",
        "2",
        "--no-accounting",
        "--dir",
        str(run.base),
    ]
    for seconds in (0.5, 3.0):
        child = subprocess.Popen(
            argv, cwd=run.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 20
        while not run.base.exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130, said
        assert not run.base.exists(), os.listdir(run.base)
        assert not processes_of(run.base)


def test_what_a_killed_rehearsal_left_is_cleared_by_the_next_one(run):
    argv = [
        sys.executable,
        "-m",
        "hpctrain",
        "rehearse",
        "--nodes",
        "1",
        "--no-accounting",
        "--dir",
        str(run.base),
    ]
    child = subprocess.Popen(
        argv, cwd=run.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (run.base / "sandbox" / "bin" / "srun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    child.kill()
    child.wait()
    assert processes_of(run.base)
    run.rehearse("--no-accounting", nodes=1)
    assert not processes_of(run.base)


def processes_of(base: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                words = Path("/proc", entry, "cmdline").read_bytes()
                where = os.readlink(f"/proc/{entry}/cwd")
            except OSError:
                continue
            if str(base).encode() in words or where.startswith(str(base)):
                found.append(entry)
    return found


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({}, None),
        ({"--nodes": "64"}, "QOSMinNode"),
        ({"--qos": "boost_qos_lprod", "--nodes": "4"}, "QOSMaxNodePerJobLimit"),
        ({"--time": "24:01:00"}, "QOSMaxWallDurationPerJobLimit"),
    ],
)
def test_queues_that_share_a_partition_have_the_limits_of_their_own_qos(tmp_path, edit, words):
    options = {
        "--account": "EUHPC_A00_000",
        "--partition": "boost_usr_prod",
        "--qos": "boost_qos_bprod",
        "--nodes": "256",
        "--ntasks-per-node": "4",
        "--gres": "gpu:4",
        "--time": "02:00:00",
    }
    lines = [f"#SBATCH {name}={value}" for name, value in {**options, **edit}.items()]
    (tmp_path / "old.sbatch").write_text("\n".join(["#!/bin/bash", *lines, "srun hostname", ""]))
    run = {"name": "r", "site": "leonardo", "recipe": "command", "account": "EUHPC_A00_000"}
    run |= {"nodes": 256, "time": "2h", "recipe_options": {"argv": ["hostname"]}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    words_given = ["rehearse", "--limits-only", "--job", "old.sbatch", "run.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain", *words_given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == (1 if words else 0), done.stderr
    assert (words or "Slurm takes the job") in done.stdout + done.stderr
