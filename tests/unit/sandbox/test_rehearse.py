"""Rehearsals without a Slurm: what the checks find, what the stand-in writes and tells, what is
made up for the job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.base.paths import shipped_dir, shipped_module
from hpctrain.data import sources
from hpctrain.plan.load import load_plan
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.sandbox import nodeview, state
from hpctrain.sandbox.rehearse import (
    checks,
    play,
    records,
    report,
    scene,
    shims,
    timeline,
    tokens,
    watch,
)
from hpctrain.sandbox.rehearse.records import Attempt

sys.path.insert(0, str(Path(__file__).parents[2]))
from hostile import HOSTILE  # noqa: E402

EXAMPLE = Path(__file__).parents[3] / "examples" / "lumi-neox-sft" / "run.yaml"
MASKS = "fe000000000000,fe00000000000000,fe0000,fe000000,fe,fe00,fe00000000,fe0000000000"

standin = shipped_module("sandbox", "standin")


def example(*assignments: str, out: str | None = None):
    return load_plan(str(EXAMPLE), ["nodes=2", *assignments], out).plan


@pytest.fixture(scope="module")
def expected():
    return play.expectation(example(), ["/scratch"])


def right(rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % 8),
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "nid000001",
        "MASTER_PORT": "21000",
        "SLURMD_NODENAME": f"nid00000{1 + rank // 8}",
        "SLURM_STEP_GPUS": "0,1,2,3,4,5,6,7",
        "ROCR_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "SLURM_CPU_BIND_LIST": MASKS,
    }


def found(expected, change) -> str:
    tasks = [right(rank) for rank in range(16)]
    tasks = [task for task in (change(task) for task in tasks) if task is not None]
    return "\n".join(map(str, checks.find_problems(tasks, expected)))


def test_what_the_plan_says_is_no_problem(expected):
    assert found(expected, lambda task: task) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda task: {**task, "RANK": "0"}, "more than once: 0"),
        (lambda task: None if task["RANK"] == "5" else task, "15 tasks were started"),
        (lambda task: {**task, "RANK": str(int(task["RANK"]) + 1)}, "missing: 0; unknown: 16"),
        (lambda task: {**task, "WORLD_SIZE": "1"}, "WORLD_SIZE is 1"),
        (lambda task: {**task, "LOCAL_RANK": "0"}, "share GPU 0 of node nid000001"),
        (lambda task: {**task, "LOCAL_RANK": "x"}, "local ranks -1"),
        (lambda task: {**task, "MASTER_ADDR": task["SLURMD_NODENAME"]}, "2 rendezvous addresses"),
        (
            lambda task: {**task, "MASTER_ADDR": "nid000002"},
            "MASTER_ADDR is nid000002, and rank 0 runs on nid000001",
        ),
        (lambda task: {**task, "MASTER_ADDR": "", "MASTER_PORT": ""}, "no MASTER_ADDR"),
        (
            lambda task: {**task, "ROCR_VISIBLE_DEVICES": str(int(task["LOCAL_RANK"]) // 2)},
            "ranks 0, 1 share GPU 0",
        ),
        (
            lambda task: {**task, "ROCR_VISIBLE_DEVICES": task["LOCAL_RANK"]},
            "rank 0 sees 1 of 8 GPUs",
        ),
        (lambda task: {**task, "HIP_VISIBLE_DEVICES": "3"}, "share GPU 3"),
        (lambda task: {**task, "ROCR_VISIBLE_DEVICES": ""}, "16 ranks see no GPU"),
        (
            lambda task: {**task, "SLURM_CPU_BIND_LIST": MASKS.replace("fe", "ff")},
            "another CPU mask than planned",
        ),
        (
            lambda task: {**task, "SLURM_CPU_BIND_TYPE": "none", "SLURM_CPU_BIND_LIST": ""},
            "no CPU mask",
        ),
        (
            lambda task: {**task, "unseen": "/scratch/x.bin", "SINGULARITY_CONTAINER": "/i.sif"},
            "the container does not bind /scratch",
        ),
    ],
)
def test_one_thing_broken_is_found(expected, change, told):
    assert told in found(expected, change)


def test_without_a_planned_mask_reserved_cores_and_too_few_are_found(expected):
    import dataclasses

    free = dataclasses.replace(expected, masks=())
    assert "core 0 in the mask" in found(
        free, lambda task: {**task, "SLURM_CPU_BIND_LIST": MASKS.replace("fe", "ff")}
    )
    assert "fewer than 7 cores" in found(
        free, lambda task: {**task, "SLURM_CPU_BIND_LIST": MASKS.replace("fe", "06")}
    )


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"none"}))
def test_what_the_stand_in_saves_is_complete_and_half_of_it_is_not(tmp_path, layout, zero):
    ranks = {"tensor": 2, "pipeline": 0, "data": 3, "zero": zero}
    expected = Expected(2, 0, 3, zero) if layout == "deepspeed" else Expected(2)
    whole = standin.write_checkpoint(str(tmp_path / "whole"), layout, 12, ranks)
    half = standin.write_checkpoint(str(tmp_path / "half"), layout, 12, ranks, until=0.5)
    rule = LAYOUTS[layout]
    assert rule.number(whole) == 12
    assert rule.verdict(str(tmp_path / "whole" / whole), Listing(), expected).faults == ()
    assert rule.verdict(str(tmp_path / "half" / half), Listing(), expected).faults != ()
    if rule.tracker and not rule.tracker_optional:
        assert rule.named_by((tmp_path / "whole" / rule.tracker).read_text()) == whole
        assert not (tmp_path / "half" / rule.tracker).exists()


@pytest.fixture
def stage(tmp_path):
    """A folder with the stand-in's pipes; `told()` gives the records so far."""
    folder = tmp_path / "stand in"
    folder.mkdir()
    for name in ("records", "hold"):
        os.mkfifo(folder / name)
    pipe = os.open(folder / "records", os.O_RDWR)
    hold = os.open(folder / "hold", os.O_RDWR)
    yield folder, pipe, hold
    os.close(pipe)


def play_task(
    folder: Path, pipe: int, hold: int, words: list[str], step, needed=(), rules=(), **environ
):
    script = folder / "python"
    script.write_text(
        shims.script(
            str(folder), step, needed, {"python": sys.executable}, sys.executable, "", dict(rules)
        )
    )
    script.chmod(0o755)
    os.close(hold)  # rank 0 has ended before this task came to wait for it
    child = subprocess.Popen(
        [str(script), *words],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    over = threading.Event()
    thread = threading.Thread(
        target=lambda: [records.release(str(folder)) for _ in iter(lambda: over.wait(0.01), True)]
    )
    thread.start()
    try:
        output = child.communicate(timeout=30)
    finally:
        over.set()
        thread.join()
    done = subprocess.CompletedProcess(child.args, child.returncode, *output)
    os.set_blocking(pipe, False)
    try:
        text = os.read(pipe, 1 << 16).decode()
    except BlockingIOError:
        text = ""
    told = [
        dict(part.partition("=")[::2] for part in record.split(shims.FIELD))
        for record in text.split(shims.END)[:-1]
    ]
    return done, told


@pytest.mark.parametrize(
    "nasty", [text for text in HOSTILE if not set(text) & set("\0\ud800") and len(text) < 3000]
)
def test_a_task_tells_exactly_what_it_saw(stage, nasty):
    done, told = play_task(
        *stage,
        ["-u", nasty, "--more"],
        ["-u", nasty],
        RANK="3",
        MASTER_ADDR=nasty,
        ROCR_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    (record,) = told
    assert (record["RANK"], record["MASTER_ADDR"], record["ROCR_VISIBLE_DEVICES"]) == (
        "3",
        nasty,
        "",
    )
    assert "CUDA_VISIBLE_DEVICES" not in record and "unseen" not in record


def test_other_words_are_for_the_real_program(stage):
    done, told = play_task(*stage, ["-c", "print(6 * 7)"], ["-u", "train.py"])
    assert (done.returncode, done.stdout, told) == (0, "42\n", [])


def test_a_task_that_misses_a_path_says_which_and_fails(stage):
    done, (record,) = play_task(
        *stage, ["train.py"], ["train.py"], ["/nowhere/a b"], RANK="1", HPCTRAIN_CONFIG="/nowhere/c"
    )
    assert done.returncode == 2
    assert record["unseen"] == "/nowhere/a b:/nowhere/c" and "/nowhere/a b" in done.stderr


def test_a_record_never_exceeds_what_a_pipe_takes_in_one_piece(stage):
    long = "/x" * 2000
    done, (record,) = play_task(
        *stage, ["t"], ["t"], RANK="1", HPCTRAIN_CONFIG="", PWD=long, SINGULARITY_CONTAINER=long
    )
    assert done.returncode == 0 and record["RANK"] == "1" and "PWD" not in record


def test_a_task_outlives_the_signal_on_which_the_program_saves(stage):
    folder, pipe, hold = stage
    script = folder / "python"
    script.write_text(
        shims.script(str(folder), ["t"], [], {"python": "/bin/false"}, "/bin/true", "USR1")
    )
    script.chmod(0o755)
    child = subprocess.Popen([str(script), "t"], env={"RANK": "1"})
    os.read(pipe, 1 << 16)
    for _ in range(3):
        time.sleep(0.2)
        child.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert child.poll() is None
    os.close(hold)
    assert child.wait(10) == 0


def test_a_recipes_script_that_needs_the_framework_is_not_run(stage):
    folder = stage[0]
    (folder / "python").write_text(
        shims.script(
            str(folder), ["t"], [], {"python": "/bin/false"}, "/bin/true", "", {"skip": ["look.py"]}
        )
    )
    for words, code in (
        (["-B", "/run/look.py", "x"], 0),
        (["/run/look.py"], 0),
        (["-c", "1", "/run/look.py"], 1),
    ):
        done = subprocess.run(
            ["sh", str(folder / "python"), *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, "not run" in done.stdout) == (code, code == 0), done


def test_tasks_wait_for_a_slot_and_lost_slots_are_given_again(tmp_path):
    os.mkfifo(tmp_path / "slots")
    slots = records.Slots(str(tmp_path))
    prolog = ["sh", "-c", shims.wait_for_slot(str(tmp_path))]
    # the batch script takes none
    assert subprocess.run(prolog, env={}, timeout=10, check=False).returncode == 0
    child = subprocess.Popen(prolog, env={"SLURM_STEP_ID": "0"})
    slots.give(0)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    slots.give(0)
    assert child.wait(10) == 0
    for _ in range(70000 // records.Slots.PER_CORE):
        slots.give(0)  # the pipe is full, and nobody is kept
    slots.close()


def test_the_head_of_the_data_is_whole_records(tmp_path):
    records = [b'{"text": "%d"}\n' % number for number in range(1000)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(records) + b"\n{}")
    source = sources.describe(str(tmp_path / "a.jsonl"))
    # Eight records of 14 bytes are the first to reach 100; all of a small file gets the line break
    # it lacks.
    for num_bytes, head in ((1, records[:1]), (100, records[:8]), (1 << 20, [*records, b"\n{}\n"])):
        (path,) = tokens._samples([source], num_bytes, tmp_path / f"in{num_bytes}")
        assert Path(path).read_bytes() == b"".join(head)


def test_what_is_wrong_with_the_data_is_said_of_the_users_file():
    own = {"/r/in/000.jsonl": "/d/my data.jsonl.gz"}
    assert (
        tokens._of_the_data(Problem("bad", "/r/in/000.jsonl:4"), own).where
        == "/d/my data.jsonl.gz:4"
    )
    assert tokens._of_the_data(Problem("bad", "here"), own).where == "here"


def test_too_small_a_disk_is_said_before_anything_is_built(tmp_path, monkeypatch):
    from hpctrain.sandbox.rehearse import stage as stages

    place = stages.Place(tmp_path, "m")
    with stages.enough_space(place, 2, False):
        pass
    monkeypatch.setattr(state, "free_kib", lambda folder: 1000)
    with (
        pytest.raises(EnvironmentFault, match="are free there") as caught,
        stages.enough_space(place, 2, True),
    ):
        raise AssertionError
    assert "--no-accounting" in caught.value.problems[0].hint
    left = iter([10**6, 0])
    monkeypatch.setattr(state, "free_kib", lambda folder: next(left))
    with (
        pytest.raises(EnvironmentFault, match="the disk is full") as caught,
        stages.enough_space(place, 2, False),
    ):
        raise EnvironmentFault("slurmd was not started")
    assert "slurmd was not started" in caught.value.problems[0].why


def test_the_four_arguments_of_neox_are_printed(stage, tmp_path):
    (tmp_path / "neox").mkdir()
    for name in ("neox/train.py", "config.yml"):
        (tmp_path / name).write_text("{}")
    words = [
        "-B",
        "/run/neox_args.py",
        f"{tmp_path}/config.yml",
        f"{tmp_path}/neox",
        f"{tmp_path}/neox/train.py",
    ]
    shutil.copy(Path(shipped_dir("templates"), "neox-sft", "rehearse_neox_args.py"), stage[0])
    rules = {"instead": {"neox_args.py": "rehearse_neox_args.py"}}
    environ = {"PATH": os.environ["PATH"]}
    done, _ = play_task(*stage, words, ["-u", "train.py"], rules=rules, **environ)
    assert (
        done.stdout.split()[::2] == ["--deepspeed_config", "--megatron_config"]
        and len(done.stdout.splitlines()) == 4
    )


def test_another_bash_hands_over_only_the_program(tmp_path):
    (tmp_path / "bash").write_text(
        shims.bash({"/opt/x/train": "/bin/false", "/opt/a b/train": "/bin/echo"})
    )
    (tmp_path / "bash").chmod(0o755)

    def run(*words):
        return subprocess.run(
            [str(tmp_path / "bash"), *words], capture_output=True, text=True, check=False
        ).stdout

    assert run("-c", '"$@"', "task", "env", "A=1", "/opt/a b/train", "x  y", "") == "x  y \n"
    assert run("-c", 'echo "$@"', "other", "/opt/a b/train") == "/opt/a b/train\n"


def test_the_scene_shows_the_sites_paths_and_makes_up_what_is_not_here(tmp_path):
    plan = example(out=str(tmp_path / "run"))
    (shown,) = scene.plan_scenes(
        [plan],
        plan.run_dir,
        "me",
        lambda path: (
            not path.startswith(("/scratch", "/project", "/users", "/flash", "/pfs", "/appl"))
        ),
    )
    targets = [target for _, target in shown.mounts]
    assert {"/scratch", "/project", "/users", "/pfs", str(tmp_path / "run")} <= set(targets)
    made = {item.what: item for item in shown.made}
    assert (
        made["start checkpoint"].kind == "checkpoint" and made["NeoX working copy"].kind == "folder"
    )
    assert made["secrets file"].path == "/users/me/.config/hpctrain/secrets.env"
    secret = scene.build(shown, str(tmp_path / "files"), plan, {"job.sbatch": b"x"})
    real = Path(shown.real_path(str(tmp_path / "files"), made["secrets file"].path))
    assert secret in real.read_text() and real.stat().st_mode & 0o777 == 0o600
    start = shown.real_path(str(tmp_path / "files"), plan.spec.checkpoint_start)
    guard = plan.resolved.guard
    wanted = Expected(
        guard.tensor_parallel, guard.pipeline_parallel, guard.data_parallel, guard.zero_stage
    )
    assert LAYOUTS["deepspeed"].verdict(start, Listing(), wanted).faults == ()
    assert (
        Path(shown.real_path(str(tmp_path / "files"), plan.run_dir), "job.sbatch").read_bytes()
        == b"x"
    )
    assert not os.path.exists(plan.run_dir)


def test_a_mount_point_below_a_folder_of_this_machine_is_made_without_touching_it(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    target = str(tmp_path / "new" / "deep")
    argv = nodeview.view_argv(
        ["bwrap"],
        [("/src", target), ("/other", str(tmp_path / "there")), ("/third", f"{target}/in")],
    )
    at = argv.index(str(tmp_path))
    assert argv[at - 1] == "--tmpfs" and argv.index("/src") > at
    assert ["--dev-bind-try", str(tmp_path / "file"), str(tmp_path / "file")] == argv[
        argv.index(str(tmp_path / "file")) - 1 :
    ][:3]
    assert not (tmp_path / "new").exists()


def attempt(restart, *events):
    fields = [{"event": name, "number": str(number)} for name, number in events]
    return Attempt("7", restart, [], [(0.0, item) for item in fields], True, float(restart))


def test_the_timeline_says_what_was_kept_and_lost():
    plan = example()
    scenario = {
        "counts_on": True,
        "step_time_s": 10.0,
        "save_time_s": 0.0,
        "offset": 100,
        "layout": "deepspeed",
    }
    attempts = [
        attempt(0, ("start", 100), ("saved", 150), ("strike", 180)),
        attempt(1, ("start", 150), ("saved", 200), ("end", 200)),
    ]
    links = [
        {
            "event": "begin",
            "link": 1,
            "job_id": "7",
            "restart": r,
            "mode": mode,
            "iteration": i,
            "checkpoint": "c",
        }
        for r, mode, i in ((0, "finetune", 100), (1, "resume", 150))
    ]
    links.append(
        {
            "event": "begin",
            "link": 2,
            "job_id": "8",
            "restart": 0,
            "mode": "done",
            "iteration": 200,
            "checkpoint": "c",
        }
    )
    bars = timeline.bars(plan, attempts, links, {"7": "COMPLETED"}, {"7": 1.0}, scenario)
    assert [(bar.kept, bar.lost, bar.outcome) for bar in bars] == [
        (150, 30, "node failed"),
        (200, 0, "done"),
        (200, 0, "done"),
    ]
    assert bars[0].took_s == 800 and bars[0].gpu_hours == pytest.approx(16 * 800 / 3600)
    assert [line.count("x") for line in timeline.text(bars)][0] > 0
    import xml.dom.minidom

    assert (
        len(xml.dom.minidom.parseString(timeline.svg(bars, "<a & b>")).getElementsByTagName("rect"))
        == 5
    )


def test_of_several_stand_ins_the_one_of_the_jobs_own_run_is_started(tmp_path):
    folders = {}
    for name in ("a", "b's $(touch canary)"):
        folder = tmp_path / "stand ins" / name
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "train").write_text(f'#!/bin/sh\necho "{name[0]}" "$@"\n')
        (folder / "bin" / "train").chmod(0o755)
        folders[f"/runs/{name}"] = str(folder)
    script = tmp_path / "train"
    script.write_text(shims.dispatch("train", folders, "/bin/echo"))
    script.chmod(0o755)
    for run_dir, told in (
        ("/runs/a", "a x y"),
        ("/runs/b's $(touch canary)", "b x y"),
        ("/runs/a/b", "x y"),
    ):
        environ = {"PATH": os.environ["PATH"], "HPCTRAIN_RUN_DIR": run_dir}
        done = subprocess.run(
            [str(script), "x", "y"],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == told + "\n"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("timeout", "--faults a:timeout"),
        ("c:timeout", "--faults a:timeout"),
        ("a:nonsense", "one of timeout, node_fail, kill_mid_save, or none"),
    ],
)
def test_faults_of_a_pipeline_name_their_stage(text, told):
    with pytest.raises(UsageError, match=told):
        report._faults_of_stage(text, ["a", "b"])
    assert report._faults_of_stage("b:timeout,none", ["a", "b"]) == ("b", ("timeout", ""))


def test_a_script_of_another_run_directory_is_not_played(tmp_path):
    plan = example(out=str(tmp_path / "a b"))
    script = tmp_path / "edited.sbatch"
    for text, fits in (
        (f"export HPCTRAIN_RUN_DIR='{tmp_path}/a b'", True),
        ("echo mine", True),
        (f"export HPCTRAIN_RUN_DIR={tmp_path}/other", False),
    ):
        script.write_text(f"#!/bin/bash\n{text}\n")
        if fits:
            assert report._own_script(str(script), plan) == script.read_bytes()
        else:
            with pytest.raises(UsageError, match="of the run directory .*other") as caught:
                report._own_script(str(script), plan)
            assert caught.value.problems[0].hint == f"-o {tmp_path}/other"


def test_a_variable_that_the_planned_script_exports_is_missed(expected):
    import dataclasses

    names = checks.exported(
        '#!/bin/bash\n  export MASTER_ADDR WORLD_SIZE\nexport RANK="$SLURM_PROCID"'
        " LOCAL_RANK=0\nMASTER_PORT=1\n"
    )
    assert names == ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    told = found(
        dataclasses.replace(expected, exports=names),
        lambda task: {k: v for k, v in task.items() if k != "RANK"},
    )
    assert "16 of 16 tasks have no RANK" in told and "no LOCAL_RANK" not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("Invalid account or account/partition combination specified", "accounts there: project_1"),
        ("Requested time limit is invalid", "allows 2-00:00:00, and job.sbatch asks for --time=0"),
        (
            (
                "Memory specification can not be satisfied; Requested node configuration is not"
                " available"
            ),
            "at most 56 cores, 480 GiB and 8 GPUs",
        ),
        ("Invalid partition name specified", "standard-g, small-g, dev-g"),
        ("Invalid job array specification", "the highest index is 1000"),
        ("Invalid qos specification", "names no such QOS"),
        ("Requested reservation is invalid", "--set sbatch.reservation=null"),
        ("Invalid node name specified", "--set sbatch.exclude=null"),
        ("Invalid feature specification", "--set sbatch.constraint=null"),
        ("something new", "something new"),
    ],
)
def test_what_slurm_refuses_is_told_with_its_cause_and_what_to_do(words, told):
    refusal = watch.Refusal(
        words, example(), ["project_1"], "#SBATCH --time=0\n#SBATCH --mem=600G\n"
    )
    problem = watch.refusal_problem(refusal)
    assert problem.what == words and told in str(problem)


def test_fewer_nodes_keep_the_global_batch_by_accumulation_and_say_so(tmp_path, capsys):
    """A run that names `train_batch_size` is rehearsed on two nodes without a word of its own."""
    given = ["nodes=8", "config.train_batch_size=24", "config.gradient_accumulation_steps=1"]
    plan = load_plan(str(EXAMPLE), [*given, "nodes=2"], str(tmp_path / "b")).plan
    assert any("batch" in problem.what for problem in plan.errors)

    wanted = report.prepare(str(EXAMPLE), given, str(tmp_path / "c"), report.Wishes(nodes=2))

    assert wanted.plans[0].errors == [] and wanted.plans[0].spec.num_nodes == 2
    assert "2 nodes keep the run's global batch with" in capsys.readouterr().err
