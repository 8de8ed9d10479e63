"""What `hpctrain tokenize` promises: the reference's bytes, exactly once, whatever happens; nothing dropped silently."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tokenize_help as help  # noqa: E402
from tokenize_help import KINDS, A, U, dialogues, model_path, oracle, write_jsonl  # noqa: E402

from hpctrain.errors import EnvironmentFault, HpctrainError, Refused, UsageError  # noqa: E402
from hpctrain.tokenize import files, run  # noqa: E402
from hpctrain.tokenize.merge import merge_shards  # noqa: E402
from hpctrain.tokenize.plan import Options  # noqa: E402
from hpctrain.tokenize.prepare import Request, prepare, write_plan  # noqa: E402
from hpctrain.tokenize.verify import verify_dataset  # noqa: E402

PLAIN = Options()


def quiet(*numbers):
    pass


def request(tmp_path, *inputs, kind="bpe_identity", tasks=1, prefix="out", options=PLAIN, **kwargs):
    return Request(
        tuple(map(str, inputs)), model_path(kind), str(tmp_path / prefix), tasks, options=options, **kwargs
    )  # fmt: skip


def do(asked, processes=1):
    prepared = prepare(asked)
    if prepared.finished:
        return prepared.finished
    write_plan(prepared.plan)
    return run.run_here(prepared.plan, processes, asked.force, False, quiet)


def pair(tmp_path, prefix="out"):
    return tuple((tmp_path / f"{prefix}_text_document{end}").read_bytes() for end in (".bin", ".idx"))


def cli(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", "tokenize", *map(str, args)],
        capture_output=True, text=True, timeout=120, check=False, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_bytes_are_the_references_for_any_number_of_tasks(tmp_path, kind):
    texts = ["", *dialogues(150, seed=1), ""]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    want = oracle(texts, model_path(kind))
    for tasks in (1, 3, 17):
        manifest = do(request(tmp_path, data, kind=kind, tasks=tasks, prefix=f"p{tasks}"))

        assert pair(tmp_path, f"p{tasks}") == want
        assert manifest["special"]["empty documents, dropped"] == 2
        assert [p for p in verify_dataset(str(tmp_path / f"p{tasks}_text_document"))[1] if p.level != "note"] == []


def test_int32_from_65500_pieces_on(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(model_path("bpe_identity")).read_bytes())
    low = min(piece.score for piece in proto.pieces)
    while len(proto.pieces) < 65500:
        piece = proto.pieces.add()
        piece.piece, piece.score = f"qzq{len(proto.pieces)}", low - len(proto.pieces)
    big = tmp_path / "big.model"
    big.write_bytes(proto.SerializeToString())
    texts = dialogues(50)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    do(Request((str(data),), str(big), str(tmp_path / "out")))

    assert pair(tmp_path) == oracle(texts, str(big)) and pair(tmp_path)[1][17] == 4


def test_compressed_parquet_and_escaped_inputs_give_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = dialogues(200, seed=2)
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    want = oracle(texts, model_path("bpe_identity"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=17)
    write_jsonl(tmp_path / "escaped.jsonl", texts, ascii=True)
    (tmp_path / "crlf.jsonl").write_bytes(plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    for number, name in enumerate(("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "escaped.jsonl", "crlf.jsonl")):
        do(request(tmp_path, tmp_path / name, tasks=5, prefix=f"p{number}"))

        assert pair(tmp_path, f"p{number}") == want, name


def test_without_the_fast_extra_the_bytes_are_the_same(tmp_path, monkeypatch):
    for name in ("orjson", "gigatoken"):
        monkeypatch.setitem(sys.modules, name, None)
    from hpctrain.tokenize import worker

    worker._encoders.clear()
    texts = dialogues(100, seed=15)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = do(request(tmp_path, data, tasks=2))

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    assert manifest["encoders"][0].startswith("sentencepiece") and "not installed" in manifest["encoder_notes"][0]
    write_jsonl(data, [*texts, f"{U}\ud800{U}"], ascii=True)
    with pytest.raises(HpctrainError, match="lone surrogate"):
        do(request(tmp_path, data, prefix="other"))
    worker._encoders.clear()


def test_many_inputs_of_all_kinds_keep_their_order(tmp_path):
    texts = dialogues(120, seed=3)
    write_jsonl(tmp_path / "1.jsonl", texts[:50])
    (tmp_path / "2.jsonl").write_text("")
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "3.jsonl", texts[50:60]).read_bytes()))
    write_jsonl(tmp_path / "4.jsonl", texts[60:])
    names = [tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl.gz", "4.jsonl")]
    for tasks in (1, 2, 9):
        do(request(tmp_path, *names, tasks=tasks, prefix=f"p{tasks}"))

        assert pair(tmp_path, f"p{tasks}") == oracle(texts, model_path("bpe_identity"))


def test_local_processes_and_the_command_line_give_the_same(tmp_path):
    texts = dialogues(300, seed=4)
    data = write_jsonl(tmp_path / "it's $(touch canary) ü.jsonl", texts)
    out = tmp_path / "an odd\tname"
    done = cli(data, "--tokenizer", model_path("unigram"), "--output-prefix", tmp_path / "o'dd $(touch canary)", "--tasks", 4,
               "--processes", 2, "--local", "--json", cwd=tmp_path)  # fmt: skip

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema_version"] == 1 and answer["status"] == "done" and answer["manifest"]["documents"] == 300
    assert pair(tmp_path, "o'dd $(touch canary)") == oracle(texts, model_path("unigram"))
    assert not list(tmp_path.rglob("canary"))
    refused = cli(data, "--tokenizer", model_path("unigram"), "--output-prefix", out, "--local")
    assert refused.returncode == 2 and "control character" in refused.stderr


def test_mpi_ranks_give_the_same_and_fail_together(tmp_path):
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    texts = dialogues(200, seed=14)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    argv = [mpiexec, "-n", "3", sys.executable, "-m", "hpctrain", "tokenize", str(data), "--tokenizer", model_path("unigram"),
            "--output-prefix", str(tmp_path / "out"), "--tasks", "7", "--engine", "mpi", "--json"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "mpi"  # one answer, from one rank
    assert pair(tmp_path) == oracle(texts, model_path("unigram"))
    write_jsonl(data, [*texts, "bad"])
    failed = subprocess.run([*argv, "--force"], capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 2 and failed.stderr.count("no marker") == 1, failed.stderr
    assert pair(tmp_path) == oracle(texts, model_path("unigram"))


def test_chat_records_give_the_same_as_text(tmp_path):
    turns = [("hello", "hi there"), ("what?", " \n"), ("a <|user|>", "b\n")]
    texts = [f"{U}{a}{U}{A}{b}{A}" for a, b in turns]
    chat = tmp_path / "chat.jsonl"
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines))
    do(request(tmp_path, chat))

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))


@pytest.mark.parametrize(
    ("messages", "hint"),
    [
        ([("system", "be kind"), ("user", "a")], "--system prepend"),
        ([("it's a tool", "x")], """--control-token '<<<|it'"'"'s a tool|>>>=<|it'"'"'s a tool|>'"""),
        ([("user", f"a {U} b")], ""),  # nothing accepts this: it would end the turn
        ([("user", "<<<|x|>>>")], "--allow unknown-marker"),
    ],
)
def test_what_is_wrong_with_a_chat_says_what_helps(tmp_path, messages, hint):
    line = json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})
    (tmp_path / "chat.jsonl").write_text(line)
    with pytest.raises(HpctrainError) as caught:
        do(request(tmp_path, tmp_path / "chat.jsonl"))
    (problem,) = caught.value.problems

    assert problem.where.endswith("chat.jsonl:1") and "byte 0" in problem.what
    assert hint in problem.hint if hint else problem.hint == ""


BAD = [
    (b'{"text": "no closing', "not JSON"),
    (b'{"txt": "x"}', "neither `text` nor `messages`"),
    (b'{"text": 5}', "is a number, not a string"),
    (json.dumps({"text": f"{U}a{U}{A}b"}).encode(), "never closed"),
    (json.dumps({"text": f"{U}a{A}b{A}{U}"}).encode(), "inside a turn"),
    (json.dumps({"text": f"x{U}a{U}"}).encode(), "text outside turns"),
    (json.dumps({"text": f"{U}<<<|sys|>>>{U}"}).encode(), "unknown marker"),
    (json.dumps({"text": f"{U}\ud800{U}"}).encode(), "lone surrogate"),
    (json.dumps({"text": f"{U}\0{U}"}).encode(), "NUL"),
    (b'{"text": "\xc3\x28"}', "not UTF-8"),
    (json.dumps({"text": "plain"}).encode(), "no marker"),
]


def bad_file(path, texts):
    """Good documents with the bad lines among them; the numbers and byte offsets of the bad ones."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    for number, (line, _) in enumerate(BAD):
        lines.insert(3 * number + 1, line)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    where = [(lines.index(line) + 1, sum(len(one) + 1 for one in lines[: lines.index(line)])) for line, _ in BAD]
    return lines, where


@pytest.mark.parametrize("tasks", [1, 6])
def test_every_bad_record_is_an_error_with_line_and_byte(tmp_path, tasks):
    data = tmp_path / "bad.jsonl"
    _, where = bad_file(data, dialogues(60, seed=6))
    with pytest.raises(HpctrainError) as caught:
        do(request(tmp_path, data, tasks=tasks))
    problems = caught.value.problems

    assert caught.value.exit_code == 2
    for problem in problems:
        number = int(problem.where.rsplit(":", 1)[1])
        index = [line for line, _ in where].index(number)
        assert BAD[index][1] in problem.what and f"byte {where[index][1]}" in problem.what or "byte" in problem.what
    assert len(problems) == len(BAD) if tasks == 1 else problems
    assert not list(tmp_path.glob("out_text*"))


def test_a_byte_order_mark_is_an_error_unless_allowed(tmp_path):
    texts = dialogues(5)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes())
    with pytest.raises(HpctrainError, match="byte order mark"):
        do(request(tmp_path, data))
    manifest = do(request(tmp_path, data, options=Options(allow=("bom",))))

    assert manifest["special"]["byte order marks removed"] == 1
    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))


def test_what_the_reference_accepts_can_be_allowed_and_is_counted(tmp_path):
    texts = [f"before {U}a{U}{A}b", f"{U}x\0y{A}<<<|sys|>>>", f"{U}a{A}"]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = do(
        request(tmp_path, data, options=Options(allow=("nul", "unbalanced", "unknown-marker", "outside-text")))
    )

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    assert manifest["special"]["nul characters"] == 1 and manifest["special"]["unknown markers kept as text"] == 1


@pytest.mark.parametrize("tasks", [1, 5])
def test_skipped_records_can_be_repaired_and_fed_again(tmp_path, tasks):
    texts = dialogues(60, seed=7)
    data = tmp_path / "bad.jsonl"
    lines, where = bad_file(data, texts)
    manifest = do(request(tmp_path, data, tasks=tasks, options=Options(on_error="skip", max_errors=len(BAD))))

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    assert manifest["rejected"] == len(BAD) and manifest["records"] == len(lines)
    assert (tmp_path / "out.rejects.jsonl").read_bytes() == b"".join(line + b"\n" for line, _ in BAD)
    reasons = [json.loads(line) for line in (tmp_path / "out.rejects.reasons.jsonl").read_text().splitlines()]
    assert [int(reason["where"].rsplit(":", 1)[1]) for reason in reasons] == [line for line, _ in where]
    repaired = write_jsonl(tmp_path / "out.rejects.jsonl", dialogues(3))
    do(request(tmp_path, repaired, prefix="again"))
    assert pair(tmp_path, "again") == oracle(dialogues(3), model_path("bpe_identity"))
    with pytest.raises(Refused, match="rejects|is there already"):
        do(request(tmp_path, data, tasks=tasks, options=Options(on_error="skip", max_errors=99)))
    assert repaired.read_text() == write_jsonl(tmp_path / "x.jsonl", dialogues(3)).read_text()


def test_more_bad_records_than_allowed_are_an_error(tmp_path):
    data = tmp_path / "bad.jsonl"
    bad_file(data, dialogues(60))
    for tasks in (1, 30):
        with pytest.raises(HpctrainError, match="more than --max-errors 10"):
            do(
                request(
                    tmp_path, data, tasks=tasks, prefix=f"p{tasks}", options=Options(on_error="skip", max_errors=10)
                )
            )
        assert not list(tmp_path.glob(f"p{tasks}_text*"))


def test_forged_tokens_of_user_defined_pieces_are_errors(tmp_path):
    tokens = (f"{U}=<sep>", f"{A}=<|assistant|>")
    good, bad = f"{U}a{U}{A}b{A}", f"{U}a{U}{A}b<sep>c{A}"
    data = write_jsonl(tmp_path / "a.jsonl", [good, bad])
    asked = request(tmp_path, data, kind="bpe_user_defined", control_tokens=tokens, allow_user_defined=True)
    with pytest.raises(HpctrainError, match="would become a control token"):
        do(asked)
    write_jsonl(data, [good])
    assert do(asked)["documents"] == 1


def test_dry_run_writes_nothing(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(5))
    before = sorted(tmp_path.rglob("*"))
    done = cli(
        data,
        "--tokenizer",
        model_path("unigram"),
        "--output-prefix",
        tmp_path / "out",
        "--local",
        "--dry-run",
        "--json",
    )

    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "planned"
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_done_twice_and_changes_are_named(tmp_path):
    texts = dialogues(50)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    do(request(tmp_path, data))
    times = [path.stat().st_mtime_ns for path in tmp_path.glob("out_text*")]
    assert prepare(request(tmp_path, data, tasks=9)).finished  # another number of tasks is no change
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
    """kill -9 at random moments; each rerun does only what is missing; the result is the single run's."""
    texts = dialogues(3000, seed=8)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    want = oracle(texts, model_path("bpe_nmt_nfkc"))
    rng = random.Random(1)
    argv = [sys.executable, "-m", "hpctrain", "tokenize", str(data), "--tokenizer", model_path("bpe_nmt_nfkc"),
            "--output-prefix", str(tmp_path / "out"), "--tasks", "12", "--processes", "1", "--local"]  # fmt: skip
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
    from hpctrain.tokenize.worker import run_shard, shard_files

    for index in (1, 4):
        run_shard(plan, plan.shards[index])
    stamps = {index: os.stat(shard_files(plan, plan.shards[index]).bin).st_mtime_ns for index in (1, 4)}
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
    argv = [sys.executable, "-m", "hpctrain", "tokenize", str(data), "--tokenizer", model_path("unigram"), "--output-prefix",
            str(tmp_path / "out"), "--tasks", "4", "--processes", "1", "--local"]  # fmt: skip
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
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
            [sys.executable, "-m", "hpctrain", "tokenize", str(tmp_path / f"{name}.jsonl"), "--tokenizer",
             model_path("unigram"), "--output-prefix", str(tmp_path / "out"), "--local"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for name in texts
    ]  # fmt: skip
    errors = [process.communicate(timeout=100)[1] for process in both]
    codes = [process.returncode for process in both]

    assert sorted(codes) in ([0, 4], [0, 0]), errors
    assert pair(tmp_path) in [oracle(some, model_path("unigram")) for some in texts.values()]
    winner = "ab"[codes.index(0)]
    if codes.count(0) == 1:
        assert pair(tmp_path) == oracle(texts[winner], model_path("unigram"))


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
    """Run `action` in a child that is gone, as by kill -9, right before file system step number `step`; whether it survived."""
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
        do(asked)
        assert pair(tmp_path) == want
    assert step > 8 and code == 0


def test_shards_killed_at_any_step_are_done_or_not_done(tmp_path):
    texts = dialogues(40, seed=13)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    asked = request(tmp_path, data, tasks=1)
    from hpctrain.tokenize.worker import run_shard

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
    from hpctrain.tokenize.worker import shard_files

    path = shard_files(plan, plan.shards[1]).manifest
    good = files.read_json(path)
    for change, words in [
        ({"documents": good["documents"] - 1}, "records, but"),
        ({"segments": [{**good["segments"][0], "first": good["segments"][0]["first"] + 1}]}, "the one before ended at"),
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
    assert mine.read_text() == "mine" and pair(tmp_path) == oracle(dialogues(10), model_path("bpe_identity"))


def test_all_mistakes_of_a_command_line_are_named_at_once(tmp_path):
    done = cli(tmp_path / "no.jsonl", "--tokenizer", tmp_path / "no.model", "--output-prefix", tmp_path / "x.bin", "--local",
               "--max-errors", 3, "--tasks", 0)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("error:") == 5, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_an_interrupted_run_says_so_and_can_go_on(tmp_path):
    texts = dialogues(2000)
    data = write_jsonl(tmp_path / "a.jsonl", texts * 2)
    argv = [sys.executable, "-m", "hpctrain", "tokenize", str(data), "--tokenizer", model_path("unigram"), "--output-prefix",
            str(tmp_path / "out"), "--tasks", "20", "--processes", "2", "--local"]  # fmt: skip
    process = subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 0), stderr
    assert cli(*argv[4:]).returncode == 0
    assert pair(tmp_path) == oracle(texts * 2, model_path("unigram"))


def test_errors_of_the_environment_have_their_code(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(3))
    with pytest.raises((UsageError, EnvironmentFault)):
        do(request(tmp_path, data, prefix="a.jsonl/out"))
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(data.read_bytes())[:-6])
    with pytest.raises(HpctrainError, match="broken gz file") as caught:
        do(request(tmp_path, tmp_path / "broken.jsonl.gz"))
    assert caught.value.exit_code == 3 and not list(tmp_path.glob("out_text*"))


def test_models_of_the_tests_are_what_they_say():
    import sentencepiece

    for kind in KINDS:
        sp = sentencepiece.SentencePieceProcessor(model_file=model_path(kind))
        assert [sp.id_to_piece(i) for i in (7, 8, 9)] == [*help.CONTROL[-3:]] or kind == "bpe_user_defined"
