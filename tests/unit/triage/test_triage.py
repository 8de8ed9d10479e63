"""Triage: every split of a log gives the same answer, and the labelled logs get the right one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.base.errors import UsageError
from hpctrain.triage import formats
from hpctrain.triage.engine import Engine
from hpctrain.triage.judge import judge
from hpctrain.triage.read import Follower, read_logs
from hpctrain.triage.rules import GREEN, NOT_OBSERVED, RED, Circumstances
from hpctrain.triage.scan import LineScanner, Matcher
from hpctrain.triage.thresholds import Thresholds, parse_thresholds

sys.path.insert(0, str(Path(__file__).parents[2]))
from triage_texts import STEP, diagnose, steps, verdicts  # noqa: E402

DATA = Path(__file__).parents[2] / "data" / "triage"
# Written after the rules, from other people's reports; docs/triage.md says how many were right at
# first sight.
SETS = [
    DATA.with_name(name)
    for name in ("triage", "triage-held-out", "triage-open", "triage-2026", "triage-probes")
]
LABELS = {
    folder / name: label
    for folder in SETS
    for name, label in json.loads((folder / "labels.json").read_text(encoding="utf-8")).items()
}
SCORED = sorted(path for path, label in LABELS.items() if label.get("scored", True))


def files_of(path):
    """The files of the start that a label is about: most are one."""
    label = LABELS[path]
    top = next(folder for folder in SETS if folder in path.parents)
    return [top / name for name in label.get("files", [path.relative_to(top)])]


@pytest.mark.parametrize("path", SCORED, ids=lambda path: path.name)
def test_a_labelled_log_gets_its_verdict_cause_and_place(path):
    label = LABELS[path]
    engine = Engine(tasks_per_node=label.get("tasks_per_node"))
    read_logs(engine, [str(file) for file in files_of(path)])
    diagnosis = judge(engine)
    event = diagnosis.cause.event if diagnosis.cause else None
    assert (event.failure if event else None) == label["cause"], diagnosis.summary
    assert diagnosis.verdict == label["verdict"], diagnosis.summary
    assert {rule for rule, verdict in verdicts(diagnosis).items() if verdict == RED} == set(
        label["red"]
    )
    if label["line"]:
        lines = Path(event.place.file).read_bytes().split(b"\n")
        assert label["line"].encode() in lines[event.place.number - 1]
    if label["rank"] is not None:
        assert event.rank == label["rank"]
    if label["node"] is not None:
        assert event.node == label["node"]
    if label.get("actions"):
        assert diagnosis.action in label["actions"]
    if label.get("recovered"):
        assert [(i.event.failure, i.recovered) for i in diagnosis.incidents] == [
            (label["recovered"], True)
        ]


def test_every_labelled_log_is_there_and_names_its_source():
    found = {
        path
        for folder in SETS
        for path in folder.rglob("*")
        if path.is_file() and path.name != "labels.json"
    }
    assert {file for path in LABELS for file in files_of(path)} == found
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
    text=st.binary(max_size=300).map(
        lambda raw: raw.replace(b"\x03", b"Error: CUDA").replace(b"\x04", b"loss=")
    ),
    anchors=st.lists(
        st.sampled_from([b"Error", b"CUDA ", b"loss=", b"r: CUDA", b"\x00\x00\x00\x00\x00"]),
        min_size=1,
        unique=True,
    ),
)
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
    hits = [
        h
        for piece in (b"a\nb\rneed", b"le x\nc", b"\n\nneedle\r\n", b"needle")
        for h in scanner.feed(piece)
    ]
    hits += list(scanner.close())
    assert [(hit.line, hit.number) for hit in hits] == [
        (b"needle x", 2),
        (b"needle", 5),
        (b"needle", 6),
    ]


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


def test_no_data_never_passes():
    for text in (b"", b"hello\n", b"hpctrain: job 1, restart 0, 1 nodes: n1\n"):
        diagnosis = diagnose(text)
        assert diagnosis.verdict == NOT_OBSERVED
        assert set(verdicts(diagnosis).values()) == {NOT_OBSERVED}


def test_grad_norm_is_not_observed_where_no_line_has_one():
    text = b"".join(
        b"INFO Step: %d, LR: 0.1, Loss: %.3f, TPS: 100.0\n" % (i, 3 - i * 0.01) for i in range(120)
    )
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
    assert (
        verdicts(diagnose(steps(60, norm=lambda i: 5000 if 30 <= i < 33 else 1.0)))["gradients"]
        == RED
    )


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
    text = (
        steps(30)
        + b"n1:1:2 [0] NCCL WARN socket: Connection reset by peer\n"
        + steps(30, first=31, total=60)
    )
    diagnosis = diagnose(text)
    assert diagnosis.cause is None
    assert verdicts(diagnosis)["communication"] == GREEN


def test_an_error_of_one_rank_is_the_cause_though_another_wrote_steps_until_srun_ended_it():
    lines = [b"step %d/120 loss=%.4f\n" % (i, 2.5 - 0.01 * i) for i in range(1, 121)]
    lines.insert(60, b"RuntimeError: HIP out of memory. Tried to allocate 9.00 GiB\n")
    failed = (
        b"hpctrain: the first task to fail was rank 1 on nid000001, with exit code 1\nhpctrain:"
        b" finished rc=1\n"
    )
    for place in (61, 80, 118, 121):
        said = [
            *lines[:place],
            b"srun: error: nid000001: task 1: Exited with exit code 1\n",
            *lines[place:],
            failed,
        ]
        ended = (
            b"slurmstepd-nid000001: error: *** STEP 7.0 ON nid000001 CANCELLED AT"
            b" 2026-11-21T15:19:13 ***\nTerminated\n"
        )
        for text in (said, [*said[: place + 3], ended, *said[place + 3 :]]):
            event = diagnose(b"".join(text)).cause.event
            assert (event.failure, event.rank) == ("gpu_oom", 1), place


def test_the_rank_gives_the_node_through_the_node_list():
    text = (
        b"hpctrain: job 7, restart 0, 2 nodes: nid[000007,000009]\n"
        + steps(3)
        + b"[rank5]: ValueError: x\n"
    )
    event = diagnose(text, tasks_per_node=4).cause.event
    assert (event.rank, event.node, event.place.number) == (5, "nid000009", 5)


def test_an_exit_code_without_a_reason_says_so():
    diagnosis = diagnose(
        b"hpctrain: job 7, restart 0, 1 nodes: n1\n" + steps(3) + b"hpctrain: finished rc=5\n"
    )
    assert diagnosis.verdict == RED
    assert diagnosis.cause.event.failure == "unknown"


def test_rc_0_without_reaching_the_end_does_not_hide_an_oom():
    text = (
        steps(3) + b"RuntimeError: HIP out of memory. Tried to allocate\nhpctrain: finished rc=0\n"
    )
    assert diagnose(text).cause.event.failure == "gpu_oom"


def test_escape_sequences_and_control_characters_do_not_reach_the_terminal():
    event = diagnose(steps(3) + b"\x1b[31mValueError: a\x07b\x1b]0;t\x9c\xff\x1b[0m\n").cause.event
    assert event.text.isprintable()


@pytest.mark.parametrize(
    ("parse", "line", "expected"),
    [
        (
            formats.megatron,
            (
                b" samples/sec: 1.5 | iteration       10/     100 | elapsed time per iteration"
                b" (ms): 1234.5 | learning rate: 1.000E-04 | approx flops per GPU: 1.0TFLOPS |"
                b" lm_loss: 1.5E+00 | loss scale: 1024.0 | number of skipped iterations:   2 |"
                b" number of nan iterations:   1 |"
            ),
            (10, 100, 1.5, None, 1e-4, 1.2345, None, 1.5, 2, 1),
        ),
        (
            formats.megatron,
            (
                b" iteration        5/  120000 | elapsed time per iteration (ms): 16491.5 |"
                b" learning rate: 0.000E+00 | loss scale: 268435456.0 | number of skipped"
                b" iterations:   5 | number of nan iterations:   0 |"
            ),
            (5, 120000, None, None, 0.0, 16.4915, None, None, 5, 0),
        ),
        (
            formats.megatron,
            (
                b" iteration     5426/  250000 | consumed samples: 43408 | lm loss: 2.0E+00 | grad"
                b" norm: nan | number of skipped iterations:   0 | number of nan iterations:   0 |"
                b" samples per second: 1.886 | TFLOPs: 78.46 |"
            ),
            (5426, 250000, 2.0, math.nan, None, None, None, 1.886, 0, 0),
        ),
        (
            formats.open_instruct,
            (
                b"x\r 3%|  2026-11-21 01:52:08 - INFO - finetune.py:948 - [RANK 0]   Step: 1, LR:"
                b" 0.00075, Loss: 6.2693, TPS: 1341.9"
            ),
            (1, None, 6.2693, None, 0.00075, None, 1341.9, None, None, None),
        ),
        (
            formats.hugging_face,
            (
                b"{'loss': '0.6931', 'grad_norm': '1.952', 'learning_rate': '0.001',"
                b" 'rewards/margins': '0', 'epoch': '0.06'}"
            ),
            (None, None, 0.6931, 1.952, 0.001, None, None, None, None, None),
        ),
        (
            formats.hugging_face,
            (
                b"{'loss': nan, 'grad_norm': inf, 'learning_rate': 2.9411764705882356e-07, 'epoch':"
                b" 0.28}"
            ),
            (None, None, math.nan, math.inf, 2.9411764705882356e-07, None, None, None, None, None),
        ),
        (
            formats.hugging_face,
            (
                b"{'step': 7, 'max_steps': 12, 'loss': 6.3, 'grad_norm': 1.3, 'learning_rate':"
                b" 0.001, 'epoch': 0.4, 'step_time': 0.12, 'samples_per_second': 33.2}"
            ),
            (7, 12, 6.3, 1.3, 0.001, 0.12, None, 33.2, None, None),
        ),
        (formats.hugging_face, b"{'eval_loss': 1.0, 'epoch': 1.0}", None),
        (formats.hugging_face, b"{'train_runtime': 3.2, 'train_loss': 0.61, 'loss': 1.0}", None),
        (
            formats.verl,
            (
                b"(TaskRunner pid=16292) step:2 - global_seqlen/min:538646.000 -"
                b" actor/pg_loss:0.001 - actor/grad_norm:np.float64(0.069) - actor/lr:0.000 -"
                b" perf/throughput:12.5"
            ),
            (2, None, 0.001, 0.069, 0.0, None, 12.5, None, None, None),
        ),
        (
            formats.em_dpo,
            (
                b"train stats after 64 examples: {'loss/train': '0.69315', 'examples_per_second':"
                b" '3.1', 'grad_norm': '12.1'}"
            ),
            (64, None, 0.69315, 12.1, None, None, None, 3.1, None, None),
        ),
        (
            formats.deepspeed,
            (
                b"[2023-04-28 06:59:46,878] [INFO] [logging.py:96:log_dist] [Rank 0] step=510,"
                b" skipped=8, lr=[9.65e-06], mom=[[0.9, 0.95]]"
            ),
            (510, None, None, None, 9.65e-06, None, None, None, 8, None),
        ),
        (
            formats.anything,
            b"2023-03-22 09:30:39 iter 2920: loss 3.9883, time 1099.34ms, mfu 15.34%",
            (2920, None, 3.9883, None, None, None, None, None, None, None),
        ),
        (formats.anything, b"step 3000: train loss 4.0390, val loss 4.0427", None),
    ],
)
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


def test_a_short_run_whose_loss_multiplies_is_red():
    assert verdicts(diagnose(steps(12, loss=lambda i: 2.3 if i == 1 else 11.0)))["loss_rise"] == RED
    assert (
        verdicts(diagnose(steps(12, loss=lambda i: 0.2 if i == 1 else 0.7)))["loss_rise"]
        == NOT_OBSERVED
    )


HEALTHY = {
    "neox": lambda i: STEP.format(i=i, n=9000, loss=2.5 - 1e-4 * i, norm=0.9 + i % 7 / 10),
    "hf": lambda i: (
        f"\r {i % 100}%|█▍        | {i}/9000 [10:02<12:01,  2.02s/it]\n{{'loss':"
        f" {2.5 - 1e-4 * i:.4f}, 'grad_norm': {0.9 + i % 7 / 10:.6f}, 'learning_rate': 1e-05,"
        f" 'epoch': 0.{i}}}\n"
    ),
    "hf5": lambda i: (
        f"{{'loss': '{2.5 - 1e-4 * i:.4f}', 'grad_norm': '{0.9 + i % 7 / 10:.6f}', 'learning_rate':"
        f" '1e-05', 'epoch': '0.{i}'}}\r {i % 100}%|█▍        | {i}/9000 [10:02<12:01,  2.02s/it]\n"
    ),
    "own": lambda i: (
        f"step {i}/9000 loss {2.5 - 1e-4 * i:.4f} grad_norm {0.9 + i % 7 / 10:.3f} {1000 + i}"
        " tok/s\n"
    ),
    "open-instruct": lambda i: (
        f"2026-11-21 01:52:08 - INFO - finetune.py:948 - [RANK 0]   Step: {i}, LR: 0.00075, Loss:"
        f" {2.5 - 1e-4 * i:.4f}, TPS: 1341.9\n"
    ),
}
HURTS = {
    "nan loss": lambda line: re.sub(
        r"(loss'?:? '?)2\.[\dE+]+", r"\1nan", line, flags=re.IGNORECASE
    ),
    "error": lambda line: line + "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB\n",
    "xid": lambda line: line + "NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus\n",
    "huge grad": (
        lambda line: (
            line.replace("0.9", "12345.9").replace("1.0", "22345.0").replace("1.1", "32345.1")
        )
    ),
    "zero grad": (
        lambda line: line.replace("0.9", "0.0").replace("1.0", "0.0").replace("1.1", "0.0")
    ),
    "skipped": lambda line: line.replace("skipped iterations:   0", "skipped iterations:   3"),
}


@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize("hurt", HURTS)
def test_a_stretch_of_healthy_step_lines_hides_nothing_that_is_wrong_in_it(kind, hurt):
    """Whatever the fast way finds is what reading every single line finds, with the same line
    numbers."""
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
        events = [
            (e.failure, e.place, e.steps_before) for kept in attempt.events.values() for e in kept
        ]
        found = {
            v.rule for v in judge(engine, Circumstances(running=False)).verdicts if v.verdict == RED
        }
        answers.append(
            (
                attempt.num_steps,
                reader.num_lines,
                attempt.last,
                attempt.last_place,
                attempt.loss.first_bad,
                attempt.skipped,
                attempt.grad_big.first_bad,
                attempt.grad_zero.first_bad,
                events,
                found,
            )
        )
    assert answers[0] == answers[1]
    assert answers[0][0] == 1999


def test_most_of_a_long_stretch_is_not_read_line_by_line():
    engine = Engine()
    reader = engine.log("x")
    parsed = []
    reader._step = lambda hit, parse, now_s, real=reader._step: (
        parsed.append(hit),
        real(hit, parse, now_s),
    )[1]
    reader.feed("".join(HEALTHY["neox"](i) for i in range(1, 20_000)).encode()[:1000_000])
    for i in range(5000, 20_000, 500):
        reader.feed("".join(HEALTHY["neox"](j) for j in range(i, i + 500)).encode())
    assert len(parsed) < 0.4 * engine.attempts[0].num_steps
