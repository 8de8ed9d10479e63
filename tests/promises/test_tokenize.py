"""What `hpctrain tokenize` promises: the reference's bytes, for every kind of model and input,
wherever it runs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tokenize_help as help  # noqa: E402
from tokenize_help import KINDS, A, U, dialogues, model_path, oracle, write_jsonl  # noqa: E402
from tokenize_runs import cli, do, pair, request  # noqa: E402

from hpctrain.base.errors import HpctrainError  # noqa: E402
from hpctrain.data.dataset.verify import verify_dataset  # noqa: E402
from hpctrain.data.prepare import Request  # noqa: E402


@pytest.mark.parametrize("kind", list(KINDS))
def test_bytes_are_the_references_for_any_number_of_tasks(tmp_path, kind):
    texts = ["", *dialogues(150, seed=1), ""]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    want = oracle(texts, model_path(kind))
    for tasks in (1, 3, 17):
        manifest = do(request(tmp_path, data, kind=kind, tasks=tasks, prefix=f"p{tasks}"))

        assert pair(tmp_path, f"p{tasks}") == want
        assert manifest["special"]["empty documents, dropped"] == 2
        assert [
            p
            for p in verify_dataset(str(tmp_path / f"p{tasks}_text_document"))[1]
            if p.level != "note"
        ] == []


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
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=17
    )
    write_jsonl(tmp_path / "escaped.jsonl", texts, ascii=True)
    (tmp_path / "crlf.jsonl").write_bytes(plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    for number, name in enumerate(
        ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "escaped.jsonl", "crlf.jsonl")
    ):
        do(request(tmp_path, tmp_path / name, tasks=5, prefix=f"p{number}"))

        assert pair(tmp_path, f"p{number}") == want, name


def test_without_the_fast_extra_the_bytes_are_the_same(tmp_path, monkeypatch):
    for name in ("orjson", "gigatoken"):
        monkeypatch.setitem(sys.modules, name, None)
    from hpctrain.data import worker

    worker._encoders.clear()
    texts = dialogues(100, seed=15)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = do(request(tmp_path, data, tasks=2))

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))
    assert (
        manifest["encoders"][0].startswith("sentencepiece")
        and "not installed" in manifest["encoder_notes"][0]
    )
    write_jsonl(data, [*texts, f"{U}\ud800{U}"], ascii=True)
    with pytest.raises(HpctrainError, match="lone surrogate"):
        do(request(tmp_path, data, prefix="other"))
    worker._encoders.clear()


def test_many_inputs_of_all_kinds_keep_their_order(tmp_path):
    texts = dialogues(120, seed=3)
    write_jsonl(tmp_path / "1.jsonl", texts[:50])
    (tmp_path / "2.jsonl").write_text("")
    (tmp_path / "3.jsonl.gz").write_bytes(
        gzip.compress(write_jsonl(tmp_path / "3.jsonl", texts[50:60]).read_bytes())
    )
    write_jsonl(tmp_path / "4.jsonl", texts[60:])
    names = [tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl.gz", "4.jsonl")]
    for tasks in (1, 2, 9):
        do(request(tmp_path, *names, tasks=tasks, prefix=f"p{tasks}"))

        assert pair(tmp_path, f"p{tasks}") == oracle(texts, model_path("bpe_identity"))


def test_local_processes_and_the_command_line_give_the_same(tmp_path):
    texts = dialogues(300, seed=4)
    data = write_jsonl(tmp_path / "it's $(touch canary) ü.jsonl", texts)
    out = tmp_path / "an odd\tname"
    done = cli(
        data,
        "--tokenizer",
        model_path("unigram"),
        "--output-prefix",
        tmp_path / "o'dd $(touch canary)",
        "--tasks",
        4,
        "--processes",
        2,
        "--local",
        "--json",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (
        answer["schema_version"] == 1
        and answer["status"] == "done"
        and answer["manifest"]["documents"] == 300
    )
    assert pair(tmp_path, "o'dd $(touch canary)") == oracle(texts, model_path("unigram"))
    assert not list(tmp_path.rglob("canary"))
    refused = cli(data, "--tokenizer", model_path("unigram"), "--output-prefix", out, "--local")
    assert refused.returncode == 2 and "control character" in refused.stderr


def test_mpi_ranks_give_the_same_and_fail_together(tmp_path):
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    texts = dialogues(200, seed=14)
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    argv = [
        mpiexec,
        "-n",
        "3",
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
        "7",
        "--engine",
        "mpi",
        "--json",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "mpi"  # one answer, from one rank
    assert pair(tmp_path) == oracle(texts, model_path("unigram"))
    write_jsonl(data, [*texts, "bad"])
    failed = subprocess.run(
        [*argv, "--force"], capture_output=True, text=True, timeout=120, check=False
    )
    assert failed.returncode == 2 and failed.stderr.count("no marker") == 1, failed.stderr
    assert pair(tmp_path) == oracle(texts, model_path("unigram"))


def test_chat_records_give_the_same_as_text(tmp_path):
    turns = [("hello", "hi there"), ("what?", " \n"), ("a <|user|>", "b\n")]
    texts = [f"{U}{a}{U}{A}{b}{A}" for a, b in turns]
    chat = tmp_path / "chat.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in turns
    ]
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines))
    do(request(tmp_path, chat))

    assert pair(tmp_path) == oracle(texts, model_path("bpe_identity"))


def test_models_of_the_tests_are_what_they_say():
    import sentencepiece

    for kind in KINDS:
        sp = sentencepiece.SentencePieceProcessor(model_file=model_path(kind))
        assert [sp.id_to_piece(i) for i in (7, 8, 9)] == [
            *help.CONTROL[-3:]
        ] or kind == "bpe_user_defined"
