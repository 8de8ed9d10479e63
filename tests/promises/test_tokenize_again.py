"""`hpctrain tokenize` again, at once, killed or with changed input: what is done is kept, what
changed is named."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenize_help import dialogues, model_path, oracle, write_jsonl  # noqa: E402
from tokenize_runs import cli, do, pair, quiet, request  # noqa: E402

from hpctrain.base.errors import HpctrainError, Refused  # noqa: E402
from hpctrain.data import run  # noqa: E402
from hpctrain.data.prepare import prepare, write_plan  # noqa: E402


def test_nothing_is_done_twice_and_changes_are_named(tmp_path):
    texts = dialogues(50)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    do(request(tmp_path, data))
    times = [path.stat().st_mtime_ns for path in tmp_path.glob("out_text*")]
    # another number of tasks is no change
    assert prepare(request(tmp_path, data, tasks=9)).finished
    os.utime(data, ns=(1, 1))
    assert prepare(request(tmp_path, data)).finished  # written again, but the same bytes
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("out_text*")] == times

    middle = bytearray(data.read_bytes())
    with pytest.raises(Refused, match="append|eod"):
        prepare(request(tmp_path, data, append_eod=False))
    with pytest.raises(Refused, match="the model changed"):
        prepare(request(tmp_path, data, kind="unigram"))
    write_jsonl(data, texts[:-1])
    with pytest.raises(Refused, match="a.jsonl` changed"):
        prepare(request(tmp_path, data))
    data.write_bytes(middle)
    manifest = do(request(tmp_path, data, append_eod=False, force=True))
    assert manifest["control"]["eod_id"] is None
    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"), append_eod=False)


def test_a_change_in_the_middle_of_a_large_input_is_noticed(tmp_path):
    texts = dialogues(4000)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    assert data.stat().st_size > 400_000
    do(request(tmp_path, data, tasks=3))
    changed = data.read_bytes()
    middle = changed.index(b"fox", len(changed) // 2)
    data.write_bytes(changed[:middle] + b"cat" + changed[middle + 3 :])

    with pytest.raises(Refused):
        prepare(request(tmp_path, data, tasks=3))


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(50))
    asked = request(tmp_path, data, tasks=2)
    prepared = prepare(asked)
    write_plan(prepared.plan)
    with data.open("a") as file:
        file.write("\n")
    with pytest.raises(HpctrainError, match="changed since the run was planned"):
        run.run_here(prepared.plan, 1, False, False, quiet)
    do(asked)


def test_a_killed_run_goes_on_with_the_shards_it_had(tmp_path):
    """kill -9 at random moments; each rerun does only what is missing; the result is the single
    run's."""
    texts = dialogues(3000, seed=8)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    want = oracle(texts, model_path("bpe_nmt_nfkc"))
    rng = random.Random(1)
    argv = [
        sys.executable,
        "-m",
        "hpctrain",
        "tokenize",
        str(data),
        "--tokenizer",
        model_path("bpe_nmt_nfkc"),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tasks",
        "12",
        "--processes",
        "1",
        "--local",
    ]
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if attempt < 6:
                process.wait(timeout=0.1 + rng.random() * (0.2 + 0.2 * attempt))
            else:
                process.wait(timeout=100)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert not (tmp_path / "out_text_document.idx").exists() or pair(tmp_path) == want
            continue
        break
    assert kills and process.returncode == 0
    assert pair(tmp_path) == want
    assert not list(tmp_path.rglob("*.bin.tmp-*"))


def test_done_shards_are_not_done_again(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(300))
    asked = request(tmp_path, data, tasks=6)
    plan = prepare(asked).plan
    write_plan(plan)
    from hpctrain.data.worker import run_shard, shard_files

    for index in (1, 4):
        run_shard(plan, plan.shards[index])
    stamps = {
        index: os.stat(shard_files(plan, plan.shards[index]).bin).st_mtime_ns for index in (1, 4)
    }
    os.truncate(shard_files(plan, plan.shards[4]).bin, 10)  # a damaged one is not done
    prepared = prepare(request(tmp_path, data, tasks=2))

    assert prepared.done == 1 and len(prepared.plan.shards) == 6  # the earlier cuts are kept
    assert [note.what for note in prepared.notes] == ["going on with the 6 shards of the last run"]
    run.run_here(prepared.plan, 1, False, True, quiet)
    assert os.stat(shard_files(plan, plan.shards[1]).bin).st_mtime_ns == stamps[1]
    assert os.stat(shard_files(plan, plan.shards[4]).bin).st_mtime_ns != stamps[4]
    assert pair(tmp_path) == oracle(dialogues(300), model_path("bpe_identity"))


def test_two_runs_at_once_make_one_right_dataset(tmp_path):
    texts = dialogues(1500, seed=9)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    argv = [
        sys.executable,
        "-m",
        "hpctrain",
        "tokenize",
        str(data),
        "--tokenizer",
        model_path("unigram"),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tasks",
        "4",
        "--processes",
        "1",
        "--local",
    ]
    both = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in both]

    assert [process.returncode for process in both] == [0, 0], outputs
    assert pair(tmp_path) == oracle(texts, model_path("unigram"))


def test_a_run_that_another_overtook_has_nothing_to_complain_of(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(20))
    asked = request(tmp_path, data, tasks=2)
    plan = prepare(asked).plan
    do(asked)
    assert run.pending(plan) == [0, 1]  # the other one removed the shards after its merge

    run._local_processes(plan, [], 0, quiet)
    assert run.tasks.merge(plan, False, False)["documents"] == 20


def test_two_different_runs_at_once_never_mix(tmp_path):
    texts = {name: dialogues(800, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    for name, some in texts.items():
        write_jsonl(tmp_path / f"{name}.jsonl", some)
    both = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "hpctrain",
                "tokenize",
                str(tmp_path / f"{name}.jsonl"),
                "--tokenizer",
                model_path("unigram"),
                "--output-prefix",
                str(tmp_path / "out"),
                "--local",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in texts
    ]
    errors = [process.communicate(timeout=100)[1] for process in both]
    codes = [process.returncode for process in both]

    assert sorted(codes) in ([0, 4], [0, 0]), errors
    assert pair(tmp_path) in [oracle(some, model_path("unigram")) for some in texts.values()]
    winner = "ab"[codes.index(0)]
    if codes.count(0) == 1:
        assert pair(tmp_path) == oracle(texts[winner], model_path("unigram"))


def test_an_interrupted_run_says_so_and_can_go_on(tmp_path):
    texts = dialogues(2000)
    data = write_jsonl(tmp_path / "a.jsonl", texts * 2)
    argv = [
        sys.executable,
        "-m",
        "hpctrain",
        "tokenize",
        str(data),
        "--tokenizer",
        model_path("unigram"),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tasks",
        "20",
        "--processes",
        "2",
        "--local",
    ]
    process = subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list(tmp_path.glob("out.tokenize/*-[0-9]*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    # the last: it came while Python was leaving
    assert process.returncode in (130, 0, -signal.SIGINT), stderr
    assert cli(*argv[4:]).returncode == 0
    assert pair(tmp_path) == oracle(texts * 2, model_path("unigram"))
