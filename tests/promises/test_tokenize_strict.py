"""Bad input to `hpctrain tokenize` is an error with its place before anything is written; nothing
is dropped silently."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenize_help import A, U, dialogues, model_path, oracle, write_jsonl  # noqa: E402
from tokenize_runs import PLAIN, cli, do, pair, request  # noqa: E402

from hpctrain.base.errors import EnvironmentFault, HpctrainError, Refused, UsageError  # noqa: E402
from hpctrain.data.plan import Options  # noqa: E402
from hpctrain.data.prepare import prepare  # noqa: E402


@pytest.mark.parametrize(
    ("messages", "hint"),
    [
        ([("system", "be kind"), ("user", "a")], "--system prepend"),
        (
            [("it's a tool", "x")],
            """--control-token '<<<|it'"'"'s a tool|>>>=<|it'"'"'s a tool|>'""",
        ),
        ([("user", f"a {U} b")], ""),  # nothing accepts this: it would end the turn
        ([("user", "<<<|x|>>>")], "--allow unknown-marker"),
    ],
)
def test_what_is_wrong_with_a_chat_says_what_helps(tmp_path, messages, hint):
    line = json.dumps(
        {"messages": [{"role": role, "content": content} for role, content in messages]}
    )
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
# Of these the byte itself is known, not only where the line begins.
WITHIN = {"not JSON": len(b'{"text": '), "not UTF-8": len(b'{"text": "')}


def bad_file(path, texts):
    """Good documents with the bad lines among them; the numbers and byte offsets of the bad
    ones."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    for number, (line, _) in enumerate(BAD):
        lines.insert(3 * number + 1, line)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    where = [
        (lines.index(line) + 1, sum(len(one) + 1 for one in lines[: lines.index(line)]))
        for line, _ in BAD
    ]
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
        words, byte = BAD[index][1], where[index][1]
        assert words in problem.what and f"byte {byte + WITHIN.get(words, 0)})" in problem.what, (
            problem
        )
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
        request(
            tmp_path,
            data,
            options=Options(allow=("nul", "unbalanced", "unknown-marker", "outside-text")),
        )
    )

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    assert (
        manifest["special"]["nul characters"] == 1
        and manifest["special"]["unknown markers kept as text"] == 1
    )


@pytest.mark.parametrize("tasks", [1, 5])
def test_skipped_records_can_be_repaired_and_fed_again(tmp_path, tasks):
    texts = dialogues(60, seed=7)
    data = tmp_path / "bad.jsonl"
    lines, where = bad_file(data, texts)
    manifest = do(
        request(tmp_path, data, tasks=tasks, options=Options(on_error="skip", max_errors=len(BAD)))
    )

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    assert manifest["rejected"] == len(BAD) and manifest["records"] == len(lines)
    assert (tmp_path / "out.rejects.jsonl").read_bytes() == b"".join(
        line + b"\n" for line, _ in BAD
    )
    reasons = [
        json.loads(line)
        for line in (tmp_path / "out.rejects.reasons.jsonl").read_text().splitlines()
    ]
    assert [int(reason["where"].rsplit(":", 1)[1]) for reason in reasons] == [
        line for line, _ in where
    ]
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
                    tmp_path,
                    data,
                    tasks=tasks,
                    prefix=f"p{tasks}",
                    options=Options(on_error="skip", max_errors=10),
                )
            )
        assert not list(tmp_path.glob(f"p{tasks}_text*"))


def test_forged_tokens_of_user_defined_pieces_are_errors(tmp_path):
    tokens = (f"{U}=<sep>", f"{A}=<|assistant|>")
    good, bad = f"{U}a{U}{A}b{A}", f"{U}a{U}{A}b<sep>c{A}"
    data = write_jsonl(tmp_path / "a.jsonl", [good, bad])
    asked = request(
        tmp_path, data, kind="bpe_user_defined", control_tokens=tokens, allow_user_defined=True
    )
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


def test_all_mistakes_of_a_command_line_are_named_at_once(tmp_path):
    done = cli(
        tmp_path / "no.jsonl",
        "--tokenizer",
        tmp_path / "no.model",
        "--output-prefix",
        tmp_path / "x.bin",
        "--local",
        "--max-errors",
        3,
        "--tasks",
        0,
    )
    assert done.returncode == 2 and done.stderr.count("error:") == 5, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_errors_of_the_environment_have_their_code(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(3))
    with pytest.raises((UsageError, EnvironmentFault)):
        do(request(tmp_path, data, prefix="a.jsonl/out"))


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_broken_compressed_file_is_bad_input_among_the_rest(tmp_path, tasks):
    """Cut off, or with a byte changed: the file, how much of its text is whole, and the bad lines
    of the other files."""
    import zstandard

    plain = write_jsonl(tmp_path / "good.jsonl", dialogues(3)).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-6])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(plain)[:-6])
    damaged = bytearray(gzip.compress(plain))
    damaged[-6] ^= 1
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    (tmp_path / "text.jsonl").write_bytes(b"not JSON\n")
    names = ("cut.jsonl.gz", "cut.jsonl.zst", "damaged.jsonl.gz", "text.jsonl")
    with pytest.raises(HpctrainError) as caught:
        do(request(tmp_path, *(tmp_path / name for name in names), tasks=tasks))
    problems = caught.value.problems

    assert caught.value.exit_code == 2 and not list(tmp_path.glob("out_text*"))
    assert all(
        "broken" in one.what and " of its text" in one.where
        for one in problems
        if "text.jsonl" not in one.where
    )
    if tasks == 1:
        assert [Path(one.where.split(":")[0]).name for one in problems] == list(names)
    skip = Options(on_error="skip", max_errors=9)
    with pytest.raises(HpctrainError, match="broken gz file"):
        do(
            request(
                tmp_path,
                tmp_path / "text.jsonl",
                tmp_path / "cut.jsonl.gz",
                prefix="skip",
                options=skip,
            )
        )
    assert not list(tmp_path.glob("skip_text*"))


@pytest.mark.parametrize("tasks", [1, 4])
def test_a_line_longer_than_the_limit_is_refused_and_taken_when_it_is_raised(tmp_path, tasks):
    texts = [*dialogues(3), f"{U}{'a long line ' * 300_000}{U}", *dialogues(3, seed=1)]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    low, high = Options(max_line_mib=1), Options(max_line_mib=4)
    with pytest.raises(HpctrainError, match="more than 1 MiB") as caught:
        do(request(tmp_path, data, tasks=tasks, options=low))

    assert caught.value.exit_code == 2
    assert (
        "--max-line-mib" in caught.value.problems[0].why
        and "a.jsonl: byte" in caught.value.problems[0].where
    )
    do(request(tmp_path, data, tasks=tasks, options=high))
    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    # another limit is no other dataset
    assert prepare(request(tmp_path, data, options=PLAIN)).finished
