"""Whatever kills `hpctrain tokenize`, at whatever step: the old dataset, none, or the new one;
nothing of the user's is lost."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenize_help import dialogues, model_path, oracle, write_jsonl  # noqa: E402
from tokenize_runs import cli, do, pair, quiet, request  # noqa: E402

from hpctrain.base import files  # noqa: E402
from hpctrain.base.errors import HpctrainError, Refused  # noqa: E402
from hpctrain.data import run  # noqa: E402
from hpctrain.data.command import How, tokenize  # noqa: E402
from hpctrain.data.merge import merge_shards  # noqa: E402
from hpctrain.data.prepare import prepare, write_plan  # noqa: E402


@pytest.mark.parametrize("limit", [1000, 30_000, 80_000])
def test_a_full_disk_leaves_nothing_partial(tmp_path, limit):
    texts = dialogues(800, seed=10)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    asked = [
        "--tokenizer",
        model_path("unigram"),
        "--output-prefix",
        tmp_path / "out",
        "--local",
        "--tasks",
        2,
        "--processes",
        1,
    ]

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = cli(data, *asked, preexec_fn=small_files)
    assert failed.returncode == 3 and "cannot be written" in failed.stderr, failed.stderr
    assert not list(tmp_path.glob("out_text*")) and not list(tmp_path.rglob("*.tmp-*"))
    assert cli(data, *asked).returncode == 0
    assert pair(tmp_path) == oracle(texts, model_path("unigram"))


STEPS = ("link", "replace", "unlink", "fsync")


def crash_at(step, action):
    """Run `action` in a child that is gone, as by kill -9, right before file system step number
    `step`; whether it survived."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > step:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("force", [False, True])
def test_a_merge_killed_at_any_step_leaves_the_old_pair_none_or_the_new(tmp_path, force):
    texts = dialogues(60, seed=11)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    old = oracle(dialogues(10, seed=12), model_path("unigram"))
    want = oracle(texts, model_path("bpe_identity"))
    prefix = tmp_path / "out_text_document"
    asked = request(tmp_path, data, tasks=2, force=force)
    for step in range(100):
        for path in tmp_path.glob("out_text*"):
            path.unlink()
        # Of another program that has the number of a dead writer: numbers are given again.
        (
            tmp_path
            / f"out_text_document.bin.tmp-{socket.gethostname().split('.')[0]}-{os.getpid()}.1-x"
        ).touch()
        if force:
            prefix.with_name(prefix.name + ".bin").write_bytes(old[0])
            prefix.with_name(prefix.name + ".idx").write_bytes(old[1])
        plan = prepare(asked).plan
        write_plan(plan)
        run.tasks.run_shards(plan, run.pending(plan))
        code = crash_at(step, lambda plan=plan: merge_shards(plan, force))
        if prefix.with_name(prefix.name + ".idx").exists():
            assert pair(tmp_path) in ([old, want] if force else [want])
        if code == 0:
            break
        assert code == 9
        tokenize(asked, How(engine="local", processes=1), print, print, quiet)
        assert pair(tmp_path) == want
        assert not list(tmp_path.rglob("*.tmp-*"))
    assert step > 8 and code == 0


def test_shards_killed_at_any_step_are_done_or_not_done(tmp_path):
    texts = dialogues(40, seed=13)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    asked = request(tmp_path, data, tasks=1)
    from hpctrain.data.worker import run_shard

    for step in range(100):
        for path in tmp_path.glob("out.tokenize/*"):
            path.unlink()
        plan = prepare(asked).plan
        write_plan(plan)
        code = crash_at(step, lambda plan=plan: run_shard(plan, plan.shards[0]))
        assert code in (0, 9)
        do(asked)
        assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
        for path in tmp_path.glob("out_text*"):
            path.unlink()
        if code == 0:
            break
    assert step > 5


def test_the_merge_refuses_shards_that_do_not_add_up(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(60))
    asked = request(tmp_path, data, tasks=3)
    plan = prepare(asked).plan
    write_plan(plan)
    run.tasks.run_shards(plan, [0, 1])
    with pytest.raises(HpctrainError, match="1 of 3 shards are not done: 2"):
        merge_shards(plan)
    run.tasks.run_shards(plan, [2])
    from hpctrain.data.worker import shard_files

    path = shard_files(plan, plan.shards[1]).manifest
    good = files.read_json(path)
    for change, words in [
        ({"documents": good["documents"] - 1}, "records, but"),
        (
            {"segments": [{**good["segments"][0], "first": good["segments"][0]["first"] + 1}]},
            "the one before ended at",
        ),
        ({"model_sha256": "0"}, "another model"),
    ]:
        files.write_json(path, {**good, **change})
        with pytest.raises(HpctrainError, match=words):
            merge_shards(plan)
        assert not list(tmp_path.glob("out_text*"))
    files.write_json(path, good)
    merge_shards(plan)


def test_nothing_of_the_users_is_replaced_or_written_through(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(10))
    mine = tmp_path / "precious"
    mine.write_text("mine")
    for end in (".bin", ".idx"):
        target = tmp_path / f"out_text_document{end}"
        os.symlink(mine, target)
        with pytest.raises(Refused):
            do(request(tmp_path, data))
        target.unlink()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out.tokenize")
    with pytest.raises(Refused, match="symlink"):
        do(request(tmp_path, data))
    assert mine.read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "out.tokenize").unlink()
    for end in (".bin", ".idx"):
        os.symlink(mine, tmp_path / f"out_text_document{end}")
    do(request(tmp_path, data, force=True))
    assert mine.read_text() == "mine" and pair(tmp_path) == oracle(
        dialogues(10), model_path("bpe_identity")
    )
