"""Triage: every split of a log gives the same answer, and the labelled logs get the right one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import UsageError
from hpctrain.triage import formats
from hpctrain.triage.engine import Engine
from hpctrain.triage.judge import judge
from hpctrain.triage.read import Follower, read_logs
from hpctrain.triage.rules import GREEN, NOT_OBSERVED, RED, Circumstances
from hpctrain.triage.scan import LineScanner, Matcher
from hpctrain.triage.thresholds import Thresholds, parse_thresholds

DATA = Path(__file__).parents[1] / "data" / "triage"
# Written after the rules, from other people's reports; docs/triage.md says how many were right at first sight.
HELD_OUT = DATA.with_name("triage-held-out")
LABELS = {
    folder / name: label
    for folder in (DATA, HELD_OUT)
    for name, label in json.loads((folder / "labels.json").read_text(encoding="utf-8")).items()
}


def diagnose(text: bytes, around: Circumstances | None = None, thresholds: Thresholds | None = None, **options):
    engine = Engine(thresholds, **options)
    reader = engine.log("x.log")
    reader.feed(text)
    reader.close()
    return judge(engine, around)


def verdicts(diagnosis):
    return {verdict.rule: verdict.verdict for verdict in diagnosis.verdicts}


@pytest.mark.parametrize("path", sorted(LABELS), ids=lambda path: path.name)
def test_a_labelled_log_gets_its_verdict_cause_and_place(path):
    label = LABELS[path]
    engine = Engine(tasks_per_node=label.get("tasks_per_node"))
    read_logs(engine, [str(path)])
    diagnosis = judge(engine)
    event = diagnosis.cause.event if diagnosis.cause else None
    assert (event.failure if event else None) == label["cause"], diagnosis.summary
    assert diagnosis.verdict == label["verdict"], diagnosis.summary
    assert {rule for rule, verdict in verdicts(diagnosis).items() if verdict == RED} == set(label["red"])
    if label["line"]:
        lines = path.read_bytes().split(b"\n")
        assert label["line"].encode() in lines[event.place.number - 1]
    if label["rank"] is not None:
        assert event.rank == label["rank"]
    if label["node"] is not None:
        assert event.node == label["node"]
    if label.get("recovered"):
        assert [(i.event.failure, i.recovered) for i in diagnosis.incidents] == [(label["recovered"], True)]


def test_every_labelled_log_is_there_and_names_its_source():
    found = {path for folder in (DATA, HELD_OUT) for path in folder.iterdir() if path.name != "labels.json"}
    assert set(LABELS) == found
    assert all(label["source"] for label in LABELS.values())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(
        [
            "triage/verl-oom.log",
            "triage/neox-nccl-timeout.out",
            "triage/hf4-loss-zero.log",
            "triage-held-out/vllm-driver-gpus.log",
        ]
    ),
)
def test_any_split_of_a_log_gives_the_same_events(seed, name):
    text = (DATA.parent / name).read_bytes()
    rnd = random.Random(seed)
    engine = Engine()
    reader = engine.log("x")
    position = 0
    while position < len(text):
        size = rnd.choice([1, 3, 17, 400, 5000])
        reader.feed(text[position : position + size])
        position += size
    reader.close()
    whole = Engine()
    whole.log("x").feed(text)
    whole.log("x").close()
    for one, other in zip(engine.attempts, whole.attempts):
        assert [(e.failure, e.place, e.text) for k in one.events.values() for e in k] == [
            (e.failure, e.place, e.text) for k in other.events.values() for e in k
        ]
        assert one.num_steps == other.num_steps
        assert one.loss.seen == other.loss.seen


@settings(max_examples=200, deadline=None)
@given(
    text=st.binary(max_size=300).map(lambda raw: raw.replace(b"\x03", b"Error: CUDA").replace(b"\x04", b"loss=")),
    anchors=st.lists(st.sampled_from([b"Error", b"CUDA ", b"loss=", b"r: CUDA", b"\x00\x00\x00\x00\x00"]), min_size=1, unique=True),
)  # fmt: skip
def test_the_matcher_finds_exactly_what_bytes_find_finds(text, anchors):
    expected = []
    for index, anchor in enumerate(anchors):
        position = text.find(anchor)
        while position >= 0:
            expected.append((position, index))
            position = text.find(anchor, position + 1)
    assert Matcher(anchors).find(text) == sorted(expected)


def test_line_numbers_count_line_feeds_whatever_the_pieces():
    scanner = LineScanner(Matcher([b"needle"]))
    hits = [h for piece in (b"a\nb\rneed", b"le x\nc", b"\n\nneedle\r\n", b"needle") for h in scanner.feed(piece)]
    hits += list(scanner.close())
    assert [(hit.line, hit.number) for hit in hits] == [(b"needle x", 2), (b"needle", 5), (b"needle", 6)]


def test_memory_stays_fixed_for_a_log_without_line_ends_and_for_a_long_one():
    import tracemalloc

    engine = Engine()
    reader = engine.log("junk")
    block = random.Random(1).randbytes(1 << 20).replace(b"\n", b"x").replace(b"\r", b"x")
    line = b"[rank3]: ValueError: x\nstep 5 loss 2.0\n" * 2000
    reader.feed(block + line)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(4):
        reader.feed(block)
    for _ in range(4):
        reader.feed(line)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 400_000


STEP = " iteration {i:8d}/{n:8d} | elapsed time per iteration (ms): 1000.0 | learning rate: 1.0E-05 | lm_loss: {loss:.6E} | grad norm: {norm} | number of skipped iterations:   0 | number of nan iterations:   0 |\n"


def steps(count, loss=lambda i: 2.5 - 0.01 * i, norm=lambda i: 1.0, first=1, total=1000):
    return "".join(STEP.format(i=i, n=total, loss=loss(i), norm=norm(i)) for i in range(first, first + count)).encode()


def test_no_data_never_passes():
    for text in (b"", b"hello\n", b"hpctrain: job 1, restart 0, 1 nodes: n1\n"):
        diagnosis = diagnose(text)
        assert diagnosis.verdict == NOT_OBSERVED
        assert set(verdicts(diagnosis).values()) == {NOT_OBSERVED}


def test_grad_norm_is_not_observed_where_no_line_has_one():
    text = b"".join(b"INFO Step: %d, LR: 0.1, Loss: %.3f, TPS: 100.0\n" % (i, 3 - i * 0.01) for i in range(120))
    found = verdicts(diagnose(text))
    assert found["gradients"] == NOT_OBSERVED
    assert found["loss_trend"] == GREEN


def test_a_quiet_phase_is_no_hang_and_silence_otherwise_is():
    text = steps(30)
    running = Circumstances(running=True, silent_s=1000)
    assert verdicts(diagnose(text, running))["hang"] == RED
    assert verdicts(diagnose(text, Circumstances(running=True, silent_s=800)))["hang"] == GREEN
    quiet = verdicts(diagnose(text + b"Caching reference logprobs: 1%\n", running))
    assert quiet["hang"] == NOT_OBSERVED


def test_slow_steps_allow_a_longer_silence():
    text = steps(30).replace(b"1000.0", b"600000.0")
    assert verdicts(diagnose(text, Circumstances(running=True, silent_s=5000)))["hang"] == GREEN
    assert verdicts(diagnose(text, Circumstances(running=True, silent_s=6100)))["hang"] == RED


def test_a_spike_is_a_remark_and_a_row_of_them_is_red():
    once = diagnose(steps(60, norm=lambda i: 5000 if i == 30 else 1.0))
    assert verdicts(once)["gradients"] == GREEN
    assert "spiked" in next(v.detail for v in once.verdicts if v.rule == "gradients")
    assert verdicts(diagnose(steps(60, norm=lambda i: 5000 if 30 <= i < 33 else 1.0)))["gradients"] == RED


def test_thresholds_change_the_verdict():
    text = steps(120, loss=lambda i: 2.5 - 0.001 * i)
    assert verdicts(diagnose(text))["loss_trend"] == GREEN
    assert not diagnose(text).safe_to_scale
    assert verdicts(diagnose(text, thresholds=Thresholds(loss_drop=0.1)))["loss_trend"] == RED
    assert diagnose(steps(120)).safe_to_scale


def test_bad_thresholds_are_all_named_at_once():
    with pytest.raises(UsageError) as error:
        parse_thresholds(["los_drop=1", "hang_min_s=abc", "in_a_row=-1", "loss_drop=nan"])
    assert len(error.value.problems) == 4
    assert dataclasses.replace(parse_thresholds(["in_a_row=5"])).in_a_row == 5


def test_what_training_survived_is_no_cause():
    text = steps(30) + b"n1:1:2 [0] NCCL WARN socket: Connection reset by peer\n" + steps(30, first=31, total=60)
    diagnosis = diagnose(text)
    assert diagnosis.cause is None
    assert verdicts(diagnosis)["communication"] == GREEN


def test_an_error_of_one_rank_is_the_cause_though_another_wrote_steps_until_srun_ended_it():
    lines = [b"step %d/120 loss=%.4f\n" % (i, 2.5 - 0.01 * i) for i in range(1, 121)]
    lines.insert(60, b"RuntimeError: HIP out of memory. Tried to allocate 9.00 GiB\n")
    failed = b"hpctrain: the first task to fail was rank 1 on nid000001, with exit code 1\nhpctrain: finished rc=1\n"
    for place in (61, 80, 118, 121):
        said = [*lines[:place], b"srun: error: nid000001: task 1: Exited with exit code 1\n", *lines[place:], failed]
        event = diagnose(b"".join(said)).cause.event
        assert (event.failure, event.rank) == ("gpu_oom", 1), place


def test_the_rank_gives_the_node_through_the_node_list():
    text = b"hpctrain: job 7, restart 0, 2 nodes: nid[000007,000009]\n" + steps(3) + b"[rank5]: ValueError: x\n"
    event = diagnose(text, tasks_per_node=4).cause.event
    assert (event.rank, event.node, event.place.number) == (5, "nid000009", 5)


def test_an_exit_code_without_a_reason_says_so():
    diagnosis = diagnose(b"hpctrain: job 7, restart 0, 1 nodes: n1\n" + steps(3) + b"hpctrain: finished rc=5\n")
    assert diagnosis.verdict == RED
    assert diagnosis.cause.event.failure == "unknown"


def test_rc_0_without_reaching_the_end_does_not_hide_an_oom():
    text = steps(3) + b"RuntimeError: HIP out of memory. Tried to allocate\nhpctrain: finished rc=0\n"
    assert diagnose(text).cause.event.failure == "gpu_oom"


def test_escape_sequences_and_control_characters_do_not_reach_the_terminal():
    event = diagnose(steps(3) + b"\x1b[31mValueError: a\x07b\x1b]0;t\x9c\xff\x1b[0m\n").cause.event
    assert event.text.isprintable()


@pytest.mark.parametrize(
    ("parse", "line", "expected"),
    [
        (formats.megatron, b" samples/sec: 1.5 | iteration       10/     100 | elapsed time per iteration (ms): 1234.5 | learning rate: 1.000E-04 | approx flops per GPU: 1.0TFLOPS | lm_loss: 1.5E+00 | loss scale: 1024.0 | number of skipped iterations:   2 | number of nan iterations:   1 |", (10, 100, 1.5, None, 1e-4, 1.2345, None, 1.5, 2, 1)),
        (formats.megatron, b" iteration        5/  120000 | elapsed time per iteration (ms): 16491.5 | learning rate: 0.000E+00 | loss scale: 268435456.0 | number of skipped iterations:   5 | number of nan iterations:   0 |", (5, 120000, None, None, 0.0, 16.4915, None, None, 5, 0)),
        (formats.megatron, b" iteration     5426/  250000 | consumed samples: 43408 | lm loss: 2.0E+00 | grad norm: nan | number of skipped iterations:   0 | number of nan iterations:   0 | samples per second: 1.886 | TFLOPs: 78.46 |", (5426, 250000, 2.0, math.nan, None, None, None, 1.886, 0, 0)),
        (formats.open_instruct, b"x\r 3%|  2026-11-21 01:52:08 - INFO - finetune.py:948 - [RANK 0]   Step: 1, LR: 0.00075, Loss: 6.2693, TPS: 1341.9", (1, None, 6.2693, None, 0.00075, None, 1341.9, None, None, None)),
        (formats.hugging_face, b"{'loss': '0.6931', 'grad_norm': '1.952', 'learning_rate': '0.001', 'rewards/margins': '0', 'epoch': '0.06'}", (None, None, 0.6931, 1.952, 0.001, None, None, None, None, None)),
        (formats.hugging_face, b"{'loss': nan, 'grad_norm': inf, 'learning_rate': 2.9411764705882356e-07, 'epoch': 0.28}", (None, None, math.nan, math.inf, 2.9411764705882356e-07, None, None, None, None, None)),
        (formats.hugging_face, b"{'step': 7, 'max_steps': 12, 'loss': 6.3, 'grad_norm': 1.3, 'learning_rate': 0.001, 'epoch': 0.4, 'step_time': 0.12, 'samples_per_second': 33.2}", (7, 12, 6.3, 1.3, 0.001, 0.12, None, 33.2, None, None)),
        (formats.hugging_face, b"{'eval_loss': 1.0, 'epoch': 1.0}", None),
        (formats.hugging_face, b"{'train_runtime': 3.2, 'train_loss': 0.61, 'loss': 1.0}", None),
        (formats.verl, b"(TaskRunner pid=16292) step:2 - global_seqlen/min:538646.000 - actor/pg_loss:0.001 - actor/grad_norm:np.float64(0.069) - actor/lr:0.000 - perf/throughput:12.5", (2, None, 0.001, 0.069, 0.0, None, 12.5, None, None, None)),
        (formats.em_dpo, b"train stats after 64 examples: {'loss/train': '0.69315', 'examples_per_second': '3.1', 'grad_norm': '12.1'}", (64, None, 0.69315, 12.1, None, None, None, 3.1, None, None)),
        (formats.deepspeed, b"[2023-04-28 06:59:46,878] [INFO] [logging.py:96:log_dist] [Rank 0] step=510, skipped=8, lr=[9.65e-06], mom=[[0.9, 0.95]]", (510, None, None, None, 9.65e-06, None, None, None, 8, None)),
        (formats.anything, b"2023-03-22 09:30:39 iter 2920: loss 3.9883, time 1099.34ms, mfu 15.34%", (2920, None, 3.9883, None, None, None, None, None, None, None)),
        (formats.anything, b"step 3000: train loss 4.0390, val loss 4.0427", None),
    ],
)  # fmt: skip
def test_the_step_line_of_each_framework(parse, line, expected):
    step = parse(line)
    if expected is None:
        assert step is None
        return
    fields = (
        "iteration",
        "total",
        "loss",
        "grad_norm",
        "lr",
        "step_time_s",
        "tokens_per_s",
        "samples_per_s",
        "skipped",
        "nan",
    )
    found = tuple(getattr(step, field) for field in fields)
    assert all((a == b) or (a != a and b != b) for a, b in zip(found, expected)), found


def test_following_reads_what_is_added_truncated_and_new(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = folder / "a.out"
    log.write_bytes(steps(5))
    engine = Engine()
    follower = Follower(engine, lambda: sorted(map(str, folder.iterdir())))
    assert follower.look() == log.stat().st_size
    assert follower.look() == 0
    with log.open("ab") as file:
        file.write(steps(5, first=6)[:-40])
    follower.look()
    with log.open("ab") as file:
        file.write(steps(5, first=6)[-40:])
    (folder / "b.out").write_bytes(b"ValueError: x\n")
    follower.look()
    assert [attempt.num_steps for attempt in engine.attempts] == [10, 0]
    assert engine.attempts[0].last_step_time_s is not None
    log.write_bytes(b"")
    follower.look()
    log.write_bytes(steps(2, first=11))
    follower.look()
    assert engine.attempts[0].num_steps == 12
    os.remove(log)
    assert follower.look() == 0


def test_the_command_line(hpctrain, tmp_path):
    good = hpctrain("triage", DATA / "neox-ok.out", "--json")
    assert good.returncode == 0
    answer = json.loads(good.stdout)
    assert answer["verdict"] == "GREEN" and answer["schema_version"] == 1
    bad = hpctrain("triage", DATA / "neox-gpu-oom.out")
    assert bad.returncode == 1
    assert "neox-gpu-oom.out:44" in bad.stdout and "train_micro_batch_size_per_gpu" in bad.stdout
    assert hpctrain("triage", DATA / "empty.log").returncode == 8
    nothing = hpctrain("triage", tmp_path / "none.log")
    assert nothing.returncode == 2 and "Traceback" not in nothing.stderr


def test_an_error_before_quick_lines_of_other_ranks_is_still_the_cause_when_the_step_failed():
    lines = "".join(f"step {i}/120 loss={2.5 - 0.01 * i:.4f}\n" for i in range(1, 60))
    rest = "".join(f"step {i}/120 loss={2.5 - 0.01 * i:.4f}\n" for i in range(60, 100))
    text = (
        lines
        + "RuntimeError: HIP out of memory. Tried\n"
        + rest
        + "srun: error: n2: task 1: Exited with exit code 1\nhpctrain: finished rc=1\n"
    )
    assert diagnose(text.encode()).cause.event.failure == "gpu_oom"


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("host_oom", "memory allocation of 2097152 bytes failed"),
        ("crash", "ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -7) local_rank: 0 (pid: 5275) of binary: python"),
        ("killed", "ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -9) local_rank: 1 (pid: 5275) of binary: python"),
        ("environment", "RuntimeError: HIP error: invalid device function"),
        ("host_oom", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=487912.batch cgroup."),
        ("node", "salloc: error: Node failure on worker-1"),
        ("host_oom", "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory."),
        ("communication", "hpctrain: error: ray: node 2 left while the program ran"),
        ("communication", "hpctrain: error: ray: 2 of 3 nodes called within 600 s; missing: 1"),
        ("config", "hpctrain: error: on nid000002: /project/verl is at warmup, and the stage needs branch gad; run: git -C …"),
        ("config", "hpctrain: error: on nid000002: `import verl` finds a folder (/project/gad/verl) and no package; install it: …"),
        ("checkpoint", "hpctrain: error: the start's models: /ck/start-model/actor has no weights; move it away"),
        ("gpu_fault", "h9:1281342:1283501 [1] include/alloc.h:50 NCCL WARN Cuda failure 'an illegal memory access was encountered'"),
    ],
)  # fmt: skip
def test_a_single_line_of_a_public_report_is_recognised(failure, line):
    assert diagnose(line.encode() + b"\n").cause.event.failure == failure


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("killed", "[launch.py:434:sigkill_handler] ['python', 'x.py'] exits with return code = -9"),
        ("crash", "[launch.py:434:sigkill_handler] ['python', 'x.py'] exits with return code = -11"),
        ("crash", "srun: error: n1: task 3: Exited with exit code 139"),
        ("crash", "prterun noticed that process rank 4 with PID 61 on node n7 exited on signal 11 (Segmentation fault)."),
        ("crash", "subprocess.CalledProcessError: Command '['x']' died with <Signals.SIGBUS: 7>."),
        ("wrapper", "srun: error: n1: task 3: Exited with exit code 2"),
        ("disk", "OSError: [Errno 28] nobody translated this"),
        ("filesystem", "mylib.SaveFailedError: cannot write (os error 30)"),
        ("filesystem", "OSError: [Errno 121] whatever"),
        ("host_oom", "OSError: [Errno 12] whatever"),
        ("communication", "OSError: [Errno 113] whatever"),
        ("missing_file", "httpx.ConnectError: [Errno 101] Network is unreachable at https://huggingface.co/x"),
        ("environment", "RuntimeError: CUDA error: the provided PTX was compiled with an unsupported toolchain."),
        ("gpu_fault", "RuntimeError: HIP error: the operation cannot be performed in the present state"),
        ("gpu_oom", "n1:1:2 [0] alloc.h:191 NCCL WARN Cuda failure 2 'out of memory'"),
        ("config", "omegaconf.errors.MissingMandatoryValue: Missing mandatory value: trainer.nnodes"),
        ("config", "yaml.scanner.ScannerError: mapping values are not allowed here"),
        ("checkpoint", "_pickle.UnpicklingError: pickle data was truncated"),
        ("node", "ray.exceptions.NodeDiedError: Task failed because the node it was running on is dead"),
        ("node", "salloc: error: Prolog failure on node node003, aborting job 1234"),
        ("node", "slurmstepd: error: Prolog failed, status 256"),
        ("environment", "RuntimeError: Error building extension 'fused_adam': [1/3] /usr/bin/nvcc"),
        ("program", "(Worker pid=12, ip=10.0.0.1) KeyError: 'input_ids'"),
        ("program", "ERROR 02-09 02:31:11 engine.py:389] ValueError: anything"),
        ("program", "2026-10-31 03:11:02,475 - Tuner - INFO - [rank7]: AssertionError"),
    ],
)  # fmt: skip
def test_families_are_told_whole_whatever_the_member(failure, line):
    """Exit codes, signals, errno, the devices' errors and the classes of exceptions: no member needs a line of its own."""
    assert diagnose(line.encode() + b"\n").cause.event.failure == failure


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        ("{0}pyarrow.lib.ArrowInvalid: JSON parse error", None),
        ("{0}queue.Empty", None),
        ("[rank3]: {0}mylib.GaveUp: no more data", 3),
        ("(Worker pid=7) {0}zlib.error: Error -3 while decompressing", None),
    ],
)
def test_the_last_line_of_a_traceback_is_the_cause_whatever_its_class(line, rank):
    prefix = line[: line.index("{0}")]
    text = "".join(
        f"{prefix}{row}\n"
        for row in ("Traceback (most recent call last):", '  File "t.py", line 3, in main', "    step(batch)")
    )
    noise = "[2026-01-01 00:00:00] [INFO] of another process\n"
    event = diagnose((text + noise + line.format("") + "\n").encode()).cause.event
    assert (event.failure, event.rank, event.place.number) == ("program", rank, 5)


def test_where_an_exception_came_through_tells_what_it_is_about():
    text = 'Traceback (most recent call last):\n  File "c.py", line 3, in {}\n    assert ok\nAssertionError: 4 != 8\n'
    for function, failure in (("load_checkpoint", "checkpoint"), ("validate_args", "config"), ("forward", "program")):
        assert diagnose(text.format(function).encode()).cause.event.failure == failure
    assert (
        diagnose(text.format("load_checkpoint").replace("4 != 8", "HIP out of memory").encode()).cause.event.failure
        == "gpu_oom"
    )


@pytest.mark.parametrize(
    "text",
    [
        "WARNING 02-09 02:31:11 engine.py:389] ValueError: not tried again\n",
        'Exception ignored in: <function A.__del__ at 0x7f>\nTraceback (most recent call last):\n  File "a.py", line 1, in x\nqueue.Empty\n',
        "subprocess returned with exit code 0, return code = 0\n",
        "sample: He said that there was a ValueError: yes\n",
    ],
)
def test_what_ended_nothing_is_no_cause(text):
    assert diagnose(text.encode()).cause is None


@pytest.mark.parametrize(
    "line",
    [
        "2026-06-10 13:18:20,846 ERROR scripts.py:447 -- it did not work",
        "fatal error: newosproc",
        "srun: error: something that no version of Slurm has said yet",
        "pdsh@n0: n1: ssh exited with exit code 1",
    ],
)
def test_a_severity_explains_only_a_start_that_never_trained(line):
    assert diagnose(line.encode() + b"\n").verdict == RED
    for text in (steps(30) + line.encode() + b"\n", line.encode() + b"\n" + steps(30)):
        diagnosis = diagnose(text)
        assert (diagnosis.verdict, diagnosis.cause) == (GREEN, None)
    failed = diagnose(steps(30) + line.encode() + b"\nsrun: error: n1: task 0: Exited with exit code 1\n")
    assert failed.cause.event.failure in ("program", "wrapper")


def test_a_log_in_which_nothing_is_known_shows_its_last_line():
    assert diagnose(b"loading\nwaiting for something\n\n").summary.endswith("the last line: waiting for something")


@pytest.mark.parametrize(
    "text",
    [
        "salloc: error: Prolog failure on node c01, aborting job 12\n",
        "slurmstepd: error: Prolog failed, status 256\nsrun: error: Task launch for StepId=12.0 failed on node c01: Job prolog failed\n",
    ],
)
def test_the_node_whose_prolog_failed_is_named(text):
    event = diagnose(text.encode()).cause.event
    assert (event.failure, event.node) == ("node", "c01")


def test_the_host_that_open_mpi_names_below_is_the_node():
    text = b"Open MPI failed an OFI Libfabric library call (fi_domain).  This is highly\nunusual\n\n  Local host: crusher051\n"
    assert diagnose(text).cause.event.node == "crusher051"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"Training Epoch: 0 Training Iteration: 1787  average_loss : 2.354  step_loss : 3.146", (1787, 2.354)),
        (
            b"[losses/total_loss: 1.64 | losses/value_loss: 7.62]:  16%|#  | 1024/6400 [1:14:23<1:13:02,  1.23it/s]",
            (1024, 1.64),
        ),
        (b"Steps:   0%|  | 12/500000 [12:44<14459:40:43, 104.11s/it, loss=0.36, lr=5e-6]", (12, 0.36)),
        (b"[17:11:05.85] Epoch: [0]  [   30/13000]  eta: 2:17:53  closs: 1.5078 (1.6011)", (30, 1.5078)),
        (b"step 3 eval/total_loss: 1.5", None),
    ],
)
def test_a_loop_of_ones_own_is_read_in_the_spellings_people_use(line, expected):
    step = formats.anything(line)
    assert (step and (step.iteration, step.loss)) == expected


def test_what_slurm_ended_is_over_though_its_tasks_wrote_on_a_little():
    ended = b"slurmstepd: error: *** STEP 5.0 ON n7 CANCELLED AT 2026-01-10T15:27:25 DUE TO TIME LIMIT ***\n"
    assert diagnose(steps(30) + ended + steps(5, first=31)).cause.event.failure == "time_limit"
    assert diagnose(steps(30) + ended + steps(5, first=20)).cause is None  # it began anew from an earlier checkpoint


def test_an_exception_while_a_package_is_imported_is_about_the_environment():
    frame = '  File "{}", line 3, in {}\n    x\n'
    package, own = "/opt/venv/lib/python3.11/site-packages/bnb/__init__.py", "/work/train.py"
    start = "Traceback (most recent call last):\n"
    end = "RuntimeError: something is wrong\n"
    importing = (
        start + frame.format(own, "<module>") + frame.format(package, "<module>") + frame.format(package, "setup") + end
    )
    assert diagnose(importing.encode()).cause.event.failure == "environment"
    calling = start + frame.format(own, "<module>") + frame.format(package, "train") + end
    assert diagnose(calling.encode()).cause.event.failure == "program"
    as_module = (
        start
        + frame.format("<frozen runpy>", "_run_module_as_main")
        + frame.format(package, "<module>")
        + frame.format(own, "main")
        + end
    )
    assert diagnose(as_module.encode()).cause.event.failure == "program"


def test_what_a_shell_says_in_passing_yields_to_any_exception():
    aside = b"df: /root/.triton/autotune: No such file or directory\n"
    assert diagnose(aside + b"srun: error: n1: task 0: Exited with exit code 1\n").cause.event.failure == "missing_file"
    assert diagnose(aside + b"ValueError: x\n").cause.event.failure == "program"


def test_a_loss_scale_that_now_and_then_skips_is_healthy_and_one_at_its_minimum_is_not():
    line = "[2026-04-28 06:52:00,878] [INFO] [logging.py:96:log_dist] [Rank 0] step={}, skipped={}, lr=[1e-06], mom=[0.9]\nstep {} loss: 2.5\n"
    assert (
        verdicts(diagnose("".join(line.format(10 * i, i // 40, 10 * i) for i in range(1, 100)).encode()))[
            "skipped_steps"
        ]
        == GREEN
    )
    assert (
        verdicts(diagnose("".join(line.format(10 * i, i, 10 * i) for i in range(1, 100)).encode()))["skipped_steps"]
        == RED
    )
    stuck = b"[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 1, reducing to 1\n"
    assert verdicts(diagnose(stuck))["skipped_steps"] == RED


def test_a_short_run_whose_loss_multiplies_is_red():
    assert verdicts(diagnose(steps(12, loss=lambda i: 2.3 if i == 1 else 11.0)))["loss_rise"] == RED
    assert verdicts(diagnose(steps(12, loss=lambda i: 0.2 if i == 1 else 0.7)))["loss_rise"] == NOT_OBSERVED


HEALTHY = {
    "neox": lambda i: STEP.format(i=i, n=9000, loss=2.5 - 1e-4 * i, norm=0.9 + i % 7 / 10),
    "hf": lambda i: f"\r {i % 100}%|█▍        | {i}/9000 [10:02<12:01,  2.02s/it]\n{{'loss': {2.5 - 1e-4 * i:.4f}, 'grad_norm': {0.9 + i % 7 / 10:.6f}, 'learning_rate': 1e-05, 'epoch': 0.{i}}}\n",
    "hf5": lambda i: f"{{'loss': '{2.5 - 1e-4 * i:.4f}', 'grad_norm': '{0.9 + i % 7 / 10:.6f}', 'learning_rate': '1e-05', 'epoch': '0.{i}'}}\r {i % 100}%|█▍        | {i}/9000 [10:02<12:01,  2.02s/it]\n",
    "own": lambda i: f"step {i}/9000 loss {2.5 - 1e-4 * i:.4f} grad_norm {0.9 + i % 7 / 10:.3f} {1000 + i} tok/s\n",
    "open-instruct": lambda i: f"2026-11-21 01:52:08 - INFO - finetune.py:948 - [RANK 0]   Step: {i}, LR: 0.00075, Loss: {2.5 - 1e-4 * i:.4f}, TPS: 1341.9\n",
}  # fmt: skip
HURTS = {
    "nan loss": lambda line: re.sub(r"(loss'?:? '?)2\.[\dE+]+", r"\1nan", line, flags=re.IGNORECASE),
    "error": lambda line: line + "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB\n",
    "xid": lambda line: line + "NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus\n",
    "huge grad": lambda line: line.replace("0.9", "12345.9").replace("1.0", "22345.0").replace("1.1", "32345.1"),
    "zero grad": lambda line: line.replace("0.9", "0.0").replace("1.0", "0.0").replace("1.1", "0.0"),
    "skipped": lambda line: line.replace("skipped iterations:   0", "skipped iterations:   3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize("hurt", HURTS)
def test_a_stretch_of_healthy_step_lines_hides_nothing_that_is_wrong_in_it(kind, hurt):
    """Whatever the fast way finds is what reading every single line finds, with the same line numbers."""
    rnd = random.Random(zlib.crc32(f"{kind} {hurt}".encode()))
    place = rnd.randint(1500, 1900)
    lines = [HEALTHY[kind](i) for i in range(1, 2000)]
    for index in (place, place + 1, place + 2) if "grad" in hurt else (place,):
        lines[index] = HURTS[hurt](lines[index])
    text = "".join(lines).encode()
    answers = []
    for on_step in (None, lambda *_: None):
        engine = Engine(on_step=on_step)
        reader = engine.log("x")
        for start in range(0, len(text), 60_000):
            reader.feed(text[start : start + 60_000])
        reader.close()
        attempt = engine.attempts[0]
        events = [(e.failure, e.place, e.steps_before) for kept in attempt.events.values() for e in kept]
        found = {v.rule for v in judge(engine, Circumstances(running=False)).verdicts if v.verdict == RED}
        answers.append((attempt.num_steps, reader.num_lines, attempt.last, attempt.last_place, attempt.loss.first_bad, attempt.skipped,
                        attempt.grad_big.first_bad, attempt.grad_zero.first_bad, events, found))  # fmt: skip
    assert answers[0] == answers[1]
    assert answers[0][0] == 1999


def test_most_of_a_long_stretch_is_not_read_line_by_line():
    engine = Engine()
    reader = engine.log("x")
    parsed = []
    reader._step = lambda hit, parse, now_s, real=reader._step: (parsed.append(hit), real(hit, parse, now_s))[1]
    reader.feed("".join(HEALTHY["neox"](i) for i in range(1, 20_000)).encode()[:1000_000])
    for i in range(5000, 20_000, 500):
        reader.feed("".join(HEALTHY["neox"](j) for j in range(i, i + 500)).encode())
    assert len(parsed) < 0.4 * engine.attempts[0].num_steps
