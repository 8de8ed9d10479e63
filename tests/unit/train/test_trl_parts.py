"""hf-sft before torch is loaded: staging by hash, what a model directory says of itself, rows that
are no rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.config.document import parse_yaml
from hpctrain.config.trainers.trl import parse_config
from hpctrain.train.core.program import newest_complete
from hpctrain.train.core.source import find_checkpoint
from hpctrain.train.trl import base, stage
from hpctrain.train.trl.rows import Encoder

CONTENT = bytes(range(256)) * 40
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "shared $(touch canary)" / "data.arrow"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def silent(text: str) -> None:
    pass


def test_a_copy_is_made_once_and_for_this_user_alone(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "node" / "me-1-data"
    path = stage.stage(str(source), SHA, str(folder), said.append)
    assert Path(path).read_bytes() == CONTENT and folder.stat().st_mode & 0o777 == 0o700
    before = os.stat(path).st_ino

    assert (
        stage.stage(str(source), SHA, str(folder), said.append) == path
        and os.stat(path).st_ino == before
    )
    assert len(said) == 1 and SHA[:16] in said[0]
    stage.clear(path)
    assert not folder.exists() and source.read_bytes() == CONTENT


def test_what_an_earlier_attempt_left_is_not_trusted(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "data.arrow").write_bytes(CONTENT[:-1] + b"x")
    (folder / "data.arrow.part").write_bytes(b"half")

    assert Path(stage.stage(str(source), SHA, str(folder), silent)).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["data.arrow"]


def test_a_source_that_changed_a_disk_that_lies_and_a_full_one_are_named_with_the_node(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "nid000007")
    folder = str(tmp_path / "node")

    def problem() -> str:
        with pytest.raises(EnvironmentFault) as caught:
            stage.stage(str(source), SHA, folder, silent)
        assert os.listdir(folder) == []
        return str(caught.value)

    source.write_bytes(CONTENT[:-1] + b"x")
    assert "node nid000007 read data that is not what was prepared" in problem()
    source.write_bytes(CONTENT)
    real = stage._copy

    def lying(one: str, other: str) -> str:
        found = real(one, other)
        Path(other).write_bytes(CONTENT[:5000] + b"\0" + CONTENT[5001:])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_copy", lying)
        assert "the disk of node nid000007 gives back other data" in problem()
    monkeypatch.setattr(
        stage.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(9, 9, 100)
    )
    assert "node nid000007 has 100 B free" in problem()


def test_a_folder_of_somebody_else_s_making_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "node").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(EnvironmentFault, match="no folder of this user"):
        stage.stage(str(source), SHA, str(tmp_path / "node"), silent)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]], cut: int = 0) -> None:
    at, header = 0, {}
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I32": 4}
    for name, (dtype, shape) in tensors.items():
        size = sizes[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + bytes(at))[: None if not cut else -cut])


def model(folder: Path, config: Any = (), **tensors: tuple[str, list[int]]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **dict(config)}))
    write_safetensors(folder / "model.safetensors", tensors or {"w": ("BF16", [3, 5])})
    return str(folder)


def test_parameters_and_bytes_are_read_from_the_headers(tmp_path: Path) -> None:
    weights = base.check_base(model(tmp_path / "m", a=("BF16", [3, 5]), b=("F32", [7])))

    assert weights and (weights.parameters, weights.num_bytes, weights.dtypes) == (
        22,
        58,
        ("BF16", "F32"),
    )


@pytest.mark.parametrize(
    "name, config, tensors, words",
    [
        ("llama-bnb-4bit", {}, {}, "its name says `bnb`"),
        ("models--unsloth--llama-3-8b-bnb-4bit", {}, {}, "its name says `bnb`"),
        ("m", {"quantization_config": {"quant_method": "awq"}}, {}, "(awq)"),
        ("m", {}, {"q_proj.weight": ("U8", [4])}, "it holds U8 tensors"),
        (
            "m",
            {},
            {"q_proj.weight": ("F32", [4]), "q_proj.qweight": ("F32", [4])},
            "it holds `q_proj.qweight`",
        ),
    ],
)
def test_a_quantised_base_is_known_by_name_config_or_tensors(
    name: str, config: Any, tensors: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        base.check_base(model(tmp_path / name, config, **tensors))

    assert "the base is quantised" in str(caught.value) and words in str(caught.value)


def test_a_base_that_is_cut_short_or_none_is_refused(tmp_path: Path) -> None:
    folder = Path(model(tmp_path / "m"))
    write_safetensors(folder / "model.safetensors", {"w": ("F32", [100])}, cut=1)
    with pytest.raises(UsageError, match="it is cut short"):
        base.check_base(str(folder))
    with pytest.raises(UsageError, match="it has no config.json"):
        base.check_base(str(tmp_path))


def test_an_update_belongs_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"})
    )
    ours = str(tmp_path)

    for same in ("/models/Llama-3.1-8B", "/cache/models--meta-llama--Llama-3.1-8B/snapshots/0123"):
        assert base.check_adapter(ours, same)
    with pytest.raises(UsageError, match="the update was trained on `meta-llama/Llama-3.1-8B`"):
        base.check_adapter(ours, "/models/Llama-3.2-3B")


def test_space_for_two_checkpoints_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(text: str) -> Any:
        return parse_config(parse_yaml(f"model_name: a\ndataset_path: b\n{text}", "c"), "/")[0]

    weights = base.Weights(8_000_000_000, 16_000_000_000, 0, ("BF16",), frozenset())
    monkeypatch.setattr(
        base.shutil,
        "disk_usage",
        lambda path: namedtuple("Usage", "total used free")(9, 9, 100 * 1024**3),
    )
    assert "needed" in base.check_space(config("lora: {r: 16}"), weights, str(tmp_path))
    # All of 8 B weights: 12 bytes each, twice.
    for text, words in (("lora: null", "178.8 GiB needed"), ("disk_gib: 500", "500.0 GiB needed")):
        with pytest.raises(EnvironmentFault, match=words):
            base.check_space(config(text), weights, str(tmp_path))


class Letters:
    """A tokenizer of single letters, without a chat template."""

    chat_template, eos_token = None, "."

    def __call__(self, text: str, **how: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    "row, words",
    [
        (None, "is not an object"),
        ({}, "has none of the columns"),
        ({"text": ""}, "empty"),
        ({"text": 3}, "is not text"),
        ({"prompt": "a"}, "must both be text"),
        ({"prompt": "a", "completion": ""}, "not empty"),
        ({"prompt": ["a"], "completion": "b"}, "must both"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user"}]}, "without `role` and `content`"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no chat template"),
        ({"conversations": [{"from": "human", "value": 3}]}, "as text"),
        ({"input_ids": ["a"]}, "whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "differ in length"),
        ({"input_ids": [True, 2]}, "whole numbers"),
    ],
)
def test_a_bad_row_is_said_to_be_one(row: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Encoder(Letters(), 100, None, False, None).encode(row)


def test_rows_with_nothing_to_train_on_are_left_out() -> None:
    encoder = Encoder(Letters(), 3, None, False, None)

    assert encoder.encode({"prompt": "abc", "completion": "d"}) is None
    assert encoder.encode({"prompt": "ab", "completion": "cd"}) == ([97, 98, 99], [-100, -100, 99])
    assert encoder.encode({"text": "ab."}) == ([97, 98, 46], [97, 98, 46])
    assert encoder.encode({"input_ids": [1, 2], "labels": [-100, -100]}) is None


def checkpoint(folder: Path, number: int, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{number}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")[
        : None if whole else 3
    ]:
        write_safetensors(path / name, {"w": ("F32", [2])})
    return path


def test_only_whole_checkpoints_are_exported_or_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    assert (
        newest_complete("hf-trainer", str(folder)) is None
        and find_checkpoint(str(tmp_path)) is None
    )
    for number, whole in ((9, True), (10, True), (12, False)):
        checkpoint(folder, number, whole)
    (folder / "checkpoint-nonsense").mkdir()
    (tmp_path / "plan.json").write_text(
        json.dumps(
            {"guard": {"schema_version": 1, "layout": "hf-trainer", "checkpoint_dir": str(folder)}}
        )
    )

    for path in (tmp_path, folder, folder / "checkpoint-10"):
        found = find_checkpoint(str(path))
        assert found and (found.path, found.iteration) == (str(folder / "checkpoint-10"), 10)
    with pytest.raises(UsageError, match="the weights are missing"):
        find_checkpoint(str(folder / "checkpoint-12"))
    (tmp_path / "plan.json").write_text(
        json.dumps(
            {"guard": {"schema_version": 1, "layout": "deepspeed", "checkpoint_dir": str(folder)}}
        )
    )
    assert find_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "ids", "whole", "fault"),
    [
        ("Paris is the capital.", [5, 6, 7], True, ""),
        ("Rīga ir Latvijas galvaspilsēta 🙂\n\t- jā", [5, 6, 7], True, ""),
        ("cut in a char\ufffd\ufffd", [5, 6, 7], False, ""),
        ("", [1], True, "empty"),
        (" \n", [4, 1], True, "empty"),
        ("\ufffd\ufffd a\ufffd b", [5, 6], True, "garbled"),
        ("ok\x00\x01\x02\x03", [5], True, "garbled"),
        ("the the the", [9, 8] * 20, False, "goes round in a circle"),
        ("ha ha ha", [9, 8] * 4, True, ""),
    ],
)
def test_a_reply_that_is_no_answer_is_told_from_one_in_words(text, ids, whole, fault):
    from hpctrain.train.trl.validate import fault_of

    assert fault_of(text, ids, whole) == fault


def test_the_faults_of_a_validation():
    from hpctrain.train.trl.validate import Reply, Validation, perplexity

    good = Validation("m", "t", 3, 30, 4.2, 6.0, 10.0, (Reply("q", "a", ""),))
    assert good.faults == []
    bad = dataclasses.replace(
        good, perplexity=float("nan"), replies=(Reply("q", "", "empty"), Reply("q", "a", ""))
    )
    assert len(bad.faults) == 3 and "1 of 2 replies are no answers: empty" in bad.faults[2]
    assert (
        perplexity(0.0) == 1
        and perplexity(1e9) == float("inf")
        and perplexity(float("nan")) != perplexity(0.0)
    )
