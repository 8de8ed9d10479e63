"""Each layout calls complete what its framework can load, and nothing else."""

from __future__ import annotations

import json
import os
import struct

import checkpoints
import pytest

from hpctrain.runtime import shards
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS

TORCH = checkpoints.torch_file({"a": 1})
ANY = Expected()


def verdict(layout, path, expected=ANY, previous=None):
    return LAYOUTS[layout].verdict(str(path), Listing(), expected, previous and str(previous))


def faults(layout, path, expected=ANY, previous=None):
    return list(verdict(layout, path, expected, previous).faults)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("tp", "dp", "zero"), [(1, 1, 0), (2, 2, 1), (2, 3, 2), (1, 4, 3), (2, 2, 3), (8, 12, 1)]
)
def test_a_whole_deepspeed_checkpoint_is_complete_and_without_any_one_file_it_is_not(
    tmp_path, tp, dp, zero, told
):
    path = checkpoints.save(str(tmp_path), 10, tp, dp, zero, told=told)
    expected = Expected() if told else Expected(tp, 0, dp, zero)
    assert faults("deepspeed", path, expected) == []
    for name in checkpoints.all_names(tp, dp, zero):
        os.rename(f"{path}/{name}", f"{tmp_path}/away")
        assert faults("deepspeed", path, expected), name
        os.rename(f"{tmp_path}/away", f"{path}/{name}")


def test_gaps_are_seen_even_when_nobody_says_how_many_ranks_there_were(tmp_path):
    path = checkpoints.save(str(tmp_path), 10, tp=2, dp=3, told=False)
    os.unlink(path + "/zero_pp_rank_1_mp_rank_01_optim_states.pt")
    assert "zero_pp_rank_1_mp_rank_01_optim_states.pt" in faults("deepspeed", path)[0]


@pytest.mark.parametrize("cut", [0, 1, 30, 100, -1])
def test_a_cut_torch_file_is_seen_at_any_length(tmp_path, cut):
    path = checkpoints.save(str(tmp_path), 10, 2, 2)
    name = path + "/zero_pp_rank_1_mp_rank_01_optim_states.pt"
    size = os.path.getsize(name)
    os.truncate(name, cut if cut >= 0 else size + cut)
    assert "zero_pp_rank_1_mp_rank_01" in faults("deepspeed", path)[0]


def test_every_length_of_a_torch_file_but_the_whole_is_damaged(tmp_path):
    for length in range(len(TORCH)):
        (tmp_path / "f.pt").write_bytes(TORCH[:length])
        assert shards.damage(str(tmp_path / "f.pt"), length) or length < 4, length
    assert shards.damage(str(write(tmp_path, {"f.pt": TORCH}) / "f.pt"), len(TORCH)) is None
    (tmp_path / "f.pt").write_bytes(TORCH + b"x")
    assert shards.damage(str(tmp_path / "f.pt"), len(TORCH) + 1)


def test_pipeline_layers_must_be_there_for_every_tensor_rank(tmp_path):
    path = tmp_path / "global_step4"
    files = {
        f"layer_{layer:02d}-model_{tp:02d}-model_states.pt": TORCH
        for layer in (0, 2, 3, 5)
        for tp in range(2)
    }
    files.update({f"mp_rank_{mp:02d}_model_states.pt": TORCH for mp in range(4)})
    files.update(
        {
            f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt": TORCH
            for mp in range(4)
            for dp in range(2)
        }
    )
    write(path, files)
    plan = Expected(tensor_parallel=2, pipeline_parallel=2, data_parallel=2, zero_stage=1)
    assert faults("deepspeed", path, plan) == []
    os.unlink(path / "layer_03-model_01-model_states.pt")
    assert "layer_03-model_01-model_states.pt" in faults("deepspeed", path, plan)[0]


def test_the_checkpoints_own_word_on_its_ranks_wins_over_the_plans_and_the_difference_is_said(
    tmp_path,
):
    path = checkpoints.save(str(tmp_path), 10, tp=2, dp=2)
    found = verdict("deepspeed", path, Expected(2, 0, 4, 1))
    assert found.faults == ()
    assert "data-parallel ranks, the plan has 4" in found.mismatches[0]
    found = verdict("deepspeed", path, Expected(4, 0, 2, 1))
    assert "model-parallel ranks, the plan has 4" in found.mismatches[0]


def test_reading_what_a_file_says_of_itself_runs_none_of_its_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    (tmp_path / "f.pt").write_bytes(checkpoints.torch_file({"dp_world_size": 3, "evil": Evil()}))
    assert shards.top_values(str(tmp_path / "f.pt"), ("dp_world_size",)) == {"dp_world_size": 3}
    assert not (tmp_path / "canary").exists()


def hf(folder, step=4, **changes):
    files = {
        "trainer_state.json": json.dumps({"global_step": step}),
        "optimizer.pt": TORCH,
        "scheduler.pt": TORCH,
        "rng_state.pth": TORCH,
        "model.safetensors": safetensors(),
        "config.json": "{}",
        **changes,
    }
    return write(
        folder / f"checkpoint-{step}",
        {name: content for name, content in files.items() if content is not None},
    )


def safetensors(payload=b"\0" * 16):
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + payload


@pytest.mark.parametrize(
    "change",
    [
        {"trainer_state.json": None},
        {"trainer_state.json": '{"global_st'},
        {"trainer_state.json": '{"global_step": 3}'},
        {"optimizer.pt": None},
        {"rng_state.pth": None},
        {"model.safetensors": safetensors(b"\0" * 15)},
        {"model.safetensors": None},
        {"checkpoint-is-incomplete.txt": ""},
        {"optimizer.pt": TORCH[:-5]},
    ],
)
def test_hf_trainer_checkpoints(tmp_path, change):
    assert faults("hf-trainer", hf(tmp_path / "good")) == []
    assert faults("hf-trainer", hf(tmp_path / "bad", **change))


def test_hf_weights_named_by_an_index_must_all_be_there(tmp_path):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    path = hf(
        tmp_path,
        **{
            "model.safetensors": None,
            "model.safetensors.index.json": index,
            "model-1.safetensors": safetensors(),
        },
    )
    assert "model-2.safetensors" in faults("hf-trainer", path)[0]
    write(path, {"model-2.safetensors": safetensors()})
    assert faults("hf-trainer", path) == []


def test_verl_needs_every_rank_of_one_world_size_in_actor_and_critic_and_the_data_position(
    tmp_path,
):
    def files(world, roles=("actor", "critic")):
        return {
            f"{role}/{kind}_world_size_{world}_rank_{rank}.pt": TORCH
            for role in roles
            for kind in ("model", "optim", "extra_state")
            for rank in range(world)
        }

    good = write(tmp_path / "global_step_5", {**files(3), "data.pt": TORCH})
    assert faults("verl", good) == []
    for name in [*files(3), "data.pt"]:
        os.rename(good / name, tmp_path / "away")
        assert faults("verl", good), name
        os.rename(tmp_path / "away", good / name)
    mixed = write(
        tmp_path / "global_step_6", {**files(3), **files(2, ("actor",)), "data.pt": TORCH}
    )
    assert "world sizes 2, 3" in faults("verl", mixed)[0]


def test_open_instruct_trusts_no_marker(tmp_path):
    good = write(
        tmp_path / "step_8",
        {
            "COMPLETED": "",
            "random_states_0.pkl": b"x",
            "random_states_1.pkl": b"x",
            "model.safetensors": safetensors(),
            "optimizer.bin": TORCH,
        },
    )
    assert faults("open-instruct", good) == []
    bad = write(
        tmp_path / "step_16",
        {
            "COMPLETED": "",
            "random_states_0.pkl": b"x",
            "model.safetensors": b"",
            "optimizer.bin": TORCH,
        },
    )
    assert faults("open-instruct", bad)
    layout = LAYOUTS["open-instruct"]
    assert layout.order("step_1") > layout.order("epoch_9")


def test_open_instruct_looks_into_deepspeed_shards(tmp_path):
    inner = {
        f"zero_pp_rank_{dp}_mp_rank_00_{kind}_states.pt": TORCH
        for dp in range(2)
        for kind in ("model", "optim")
    }
    files = {
        "COMPLETED": "",
        **{f"random_states_{rank}.pkl": b"x" for rank in range(2)},
        **{f"pytorch_model/{name}": content for name, content in inner.items()},
    }
    path = write(tmp_path / "step_3", files)
    assert faults("open-instruct", path) == []
    os.unlink(path / "pytorch_model" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert faults("open-instruct", path)


def test_an_open_instruct_model_is_exported_when_all_its_parts_are_younger_than_the_last_checkpoint(
    tmp_path,
):
    write(
        tmp_path,
        {
            "step_6/COMPLETED": "",
            "model-1.safetensors": safetensors(),
            "tokenizer_config.json": "{}",
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {"a": "model-1.safetensors"}}
            ),
        },
    )

    def lacking():
        return LAYOUTS["open-instruct"].export_faults(str(tmp_path), "step_6", Listing())

    assert lacking() == []
    os.utime(tmp_path / "step_6" / "COMPLETED", (2**31, 2**31))
    assert "older than `step_6`" in lacking()[0]
    os.utime(tmp_path / "step_6" / "COMPLETED", (0, 0))
    for name, fault in (
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("model-1.safetensors", "model-1.safetensors"),
    ):
        os.rename(tmp_path / name, tmp_path / "away")
        assert fault in lacking()[0]
        os.rename(tmp_path / "away", tmp_path / name)
    os.truncate(tmp_path / "model-1.safetensors", 20)
    assert "model-1.safetensors" in lacking()[0]


@pytest.mark.parametrize(
    "form", ["mp_rank_{:02d}/model_optim_rng.pt", "mp_rank_{:02d}_{:03d}/model_optim_rng.pt"]
)
def test_megatron_ranks(tmp_path, form):
    stages = 2 if form.count("{") == 2 else 1
    names = [form.format(tp, pp) for tp in range(2) for pp in range(stages)]
    path = write(tmp_path / "iter_0000100", dict.fromkeys(names, TORCH))
    plan = Expected(tensor_parallel=2, pipeline_parallel=stages)
    assert faults("megatron", path, plan) == []
    os.unlink(path / names[-1])
    assert faults("megatron", path, plan)


@pytest.mark.parametrize(
    ("layout", "name", "number", "text"),
    [
        ("deepspeed", "global_step100", 100, "global_step100"),
        ("deepspeed", "start-7", 7, "start-7"),
        ("deepspeed", "global_step100_bak", None, None),
        ("deepspeed", "_global_step100", None, None),
        ("deepspeed", "global_step", None, None),
        ("megatron", "iter_0000100", 100, "100"),
        ("verl", "global_step_5", 5, "5"),
        ("hf-trainer", "checkpoint-12", 12, None),
        ("hf-trainer", "checkpoint-12-old", None, None),
        ("open-instruct", "epoch_2", 2, None),
        ("dcp", "step-3", 3, "step-3"),
        ("none", "global_step1", None, None),
    ],
)
def test_names(layout, name, number, text):
    rules = LAYOUTS[layout]
    assert rules.number(name) == number
    if text:
        assert rules.tracker_text(name) == text
        assert rules.named_by(text + "\n") == name


@pytest.mark.parametrize("text", ["", " \n", "../other", "/abs", "a/b", "..", "\0"])
def test_a_tracker_cannot_name_anything_outside_the_folder(text):
    assert LAYOUTS["deepspeed"].named_by(text) is None


def test_no_folder_is_listed_twice_and_no_file_is_stated_twice_or_read_whole(tmp_path, monkeypatch):
    """1544 shards as of 192 nodes, on a file system where every call costs."""
    path = checkpoints.save(str(tmp_path), 10, tp=8, dp=24)
    listed, opened, read = [], [], []
    scandir, open_, pread = os.scandir, os.open, os.pread
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    monkeypatch.setattr(
        os, "open", lambda path, *args: (opened.append(path), open_(path, *args))[1]
    )
    monkeypatch.setattr(
        os, "pread", lambda fd, size, at: (read.append(size), pread(fd, size, at))[1]
    )
    assert faults("deepspeed", path, Expected(8, 0, 24, 1)) == []
    assert len(listed) == len(set(listed)) == 1
    assert len(opened) == len(set(opened)) == 8 + 8 * 24
    assert max(read) <= 65536
