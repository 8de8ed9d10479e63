"""The rule of proof: complete, torn, unknown, unreadable; each from what lies there, and only torn
ones are ever moved."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import zipfile
from pathlib import Path

import checkpoints
import pytest

from hpctrain.runtime.dcp import read_index
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS, judge_path

TORCH = checkpoints.torch_file({"step": 1})


def write(folder, files):
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder)


class _StorageInfo:
    def __init__(self, relative_path, offset, length):
        self.relative_path, self.offset, self.length = relative_path, offset, length


class Metadata:
    def __init__(self, storage_data):
        self.storage_data = storage_data


def index(**lengths):
    """A `.metadata` as torch pickles it, for files `__0_0` … of these lengths."""
    entries = {
        (name, part): _StorageInfo(f"{name}.distcp", part * 10, 10)
        for name, length in lengths.items()
        for part in range(length // 10)
    }
    return pickle.dumps(Metadata(entries), protocol=4)


def dcp(folder, **lengths):
    files = {f"{name}.distcp": b"x" * length for name, length in lengths.items()}
    return write(folder, {**files, ".metadata": index(**lengths)})


def state(path, layout=None):
    if layout is None:
        return judge_path(str(path))[1].state
    return LAYOUTS[layout].verdict(str(path), Listing(), Expected()).state


def hf(folder, step=5, **more):
    trainer = json.dumps({"global_step": step}).encode()
    files = {
        "model.safetensors": safetensors(),
        "optimizer.pt": TORCH,
        "scheduler.pt": TORCH,
        "rng_state.pth": TORCH,
    }
    return write(folder, {**files, "trainer_state.json": trainer, **more})


def safetensors():
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 8


class TestTorchDistributed:
    def test_an_empty_file_of_a_rank_without_a_part_is_named_by_nobody(self, tmp_path):
        path = dcp(tmp_path / "step-5", __0_0=20, __1_0=30)
        write(path, {"__3_0.distcp": b""})
        assert state(path) == state(path, "dcp") == "complete"

    def test_a_file_that_the_index_names_is_missed_whoever_is_left(self, tmp_path):
        path = dcp(tmp_path / "step-5", __0_0=20, __1_0=30)
        os.unlink(path / "__1_0.distcp")
        form, verdict = judge_path(str(path))
        assert verdict.state == "torn" and "`__1_0.distcp`" in verdict.faults[0]

    @pytest.mark.parametrize("left", [0, 1, 29])
    def test_a_file_shorter_than_its_last_entry_is_cut(self, tmp_path, left):
        path = dcp(tmp_path / "step-5", __0_0=20, __1_0=30)
        os.truncate(path / "__1_0.distcp", left)
        assert state(path) == "torn"

    def test_a_longer_file_is_another_saves_or_not_nobody_can_say(self, tmp_path):
        path = dcp(tmp_path / "step-5", __0_0=20)
        (path / "__0_0.distcp").write_bytes(b"x" * 21)
        assert state(path) == "unknown"

    @pytest.mark.parametrize("keep", [0, 1, 5, 40])
    def test_a_cut_index_is_torn_whatever_else_is_there(self, tmp_path, keep):
        path = dcp(tmp_path / "step-5", __0_0=20)
        (path / ".metadata").write_bytes(index(__0_0=20)[:keep])
        assert state(path) == "torn"

    def test_indexes_of_fewer_ranks_than_before_may_be_all_or_not(self, tmp_path):
        for rank in range(2):
            for step in (4, 5):
                made = dcp(tmp_path / f"step-{step}", **{f"__{rank}_0": 20})
                (made / ".metadata").rename(made / f"__{rank}.metadata")
        path = tmp_path / "step-5"
        assert state(path) == "complete"
        os.unlink(path / "__1.metadata")
        assert state(path) == "torn"
        os.unlink(path / "__1_0.distcp")
        assert state(path) == "unknown"

    def test_an_index_runs_nothing_and_reads_nothing_elsewhere(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/pwned",)

        path = dcp(tmp_path / "step-5", __0_0=20)
        (path / ".metadata").write_bytes(pickle.dumps([Evil()]))
        assert state(path) == "torn"
        bad = Metadata({1: _StorageInfo("../../secret", 0, 1)})
        (path / ".metadata").write_bytes(pickle.dumps(bad))
        assert state(path) == "unknown"
        assert not (tmp_path / "pwned").exists()

    def test_the_garbage_collector_is_as_it_was(self, tmp_path):
        import gc

        path = dcp(tmp_path / "step-5", __0_0=20)
        assert read_index(str(path / ".metadata")).last == {"__0_0.distcp": (10, 20)}
        assert gc.isenabled()

    @pytest.mark.parametrize("extra", [{}, {"metadata.json": b"{}", "common.pt": TORCH}])
    def test_megatrons_formats_are_told_apart_by_what_they_hold(self, tmp_path, extra):
        path = dcp(tmp_path / "iter_0000100", __0_0=20)
        write(path, extra)
        assert state(path, "megatron") == "complete"
        for name in extra:
            kept = (path / name).read_bytes()
            os.unlink(path / name)
            assert state(path, "megatron") == "torn"
            (path / name).write_bytes(kept)

    def test_olmo_core_keeps_its_parts_one_level_down(self, tmp_path):
        path = tmp_path / "step10"
        dcp(path / "model_and_optim", __0_0=20)
        rank = checkpoints.torch_file({"world_size": 2, "global_step": 10})
        write(
            path,
            {"train/rank0.pt": rank, "train/rank1.pt": rank, ".metadata.json": b'{"version": "3"}'},
        )
        assert state(path, "dcp") == state(path, "olmo-core") == state(path) == "complete"
        os.unlink(path / "train" / "rank1.pt")  # the framework lets the first rank's stand in
        assert state(path, "dcp") == "complete"
        os.unlink(path / "train" / "rank0.pt")
        assert state(path, "dcp") == "torn"

    def test_torchtitans_last_step_may_be_a_model(self, tmp_path):
        shard = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
        files = {"model.safetensors.index.json": json.dumps(shard).encode()}
        path = write(
            tmp_path / "step-9", {**files, "model-00001-of-00001.safetensors": safetensors()}
        )
        assert state(path, "torchtitan") == state(path, "dcp") == "complete"


class TestHuggingFace:
    @pytest.mark.parametrize(
        "name",
        [
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            "model.safetensors",
        ],
    )
    def test_what_the_trainer_would_begin_anew_in_silence_is_missed(self, tmp_path, name):
        path = hf(tmp_path / "checkpoint-5")
        assert state(path, "hf-trainer") == "complete"
        os.unlink(path / name)
        assert state(path, "hf-trainer") == "torn"

    def test_a_model_saved_alone_on_purpose_is_no_damage(self, tmp_path):
        path = hf(tmp_path / "checkpoint-5")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            os.unlink(path / name)
        assert state(path, "hf-trainer") == "unknown"

    def test_parts_in_files_that_nobody_knows_are_unknown_and_not_missing(self, tmp_path):
        path = hf(tmp_path / "checkpoint-5", **{"optimizer_state_v2/part0.bin2": b"new format"})
        os.unlink(path / "optimizer.pt")
        os.unlink(path / "scheduler.pt")
        assert state(path, "hf-trainer") == "unknown"

    def test_fsdp_parts_are_judged_by_their_own_index(self, tmp_path):
        path = hf(tmp_path / "checkpoint-5")
        os.unlink(path / "optimizer.pt")
        os.unlink(path / "model.safetensors")
        dcp(path / "pytorch_model_fsdp_0", __0_0=20)
        dcp(path / "optimizer_0", __0_0=20, __1_0=20)
        assert state(path, "hf-trainer") == "complete"
        os.unlink(path / "optimizer_0" / "__1_0.distcp")
        assert state(path, "hf-trainer") == "torn"

    def test_where_fsdp_keeps_the_whole_model_in_a_file_of_its_own_the_other_is_read_by_nobody(
        self, tmp_path
    ):
        whole = {"pytorch_model_fsdp.bin": TORCH, "optimizer.bin": TORCH}
        path = hf(tmp_path / "checkpoint-5", **whole)
        os.unlink(path / "optimizer.pt")
        (path / "model.safetensors").write_bytes(safetensors()[:-3])
        assert state(path) == "complete"
        os.truncate(path / "pytorch_model_fsdp.bin", len(TORCH) - 3)
        assert state(path) == "torn"

    def test_the_models_description_is_read_by_all_but_deepspeed(self, tmp_path):
        path = hf(tmp_path / "checkpoint-5", **{"config.json": b'{"vocab'})
        assert state(path) == "torn"
        os.unlink(path / "optimizer.pt")
        engine = {"dp_world_size": 1, "ds_config": {"zero_optimization": {"stage": 1}}}
        shards = {
            "mp_rank_00_model_states.pt": checkpoints.torch_file({**engine, "global_steps": 5}),
            "zero_pp_rank_0_mp_rank_00_optim_states.pt": TORCH,
        }
        write(path / "global_step5", shards)
        write(path, {"latest": b"global_step5"})
        assert state(path) == "complete"

    def test_a_save_that_was_cut_off_at_its_first_file_is_torn_in_its_own_layout(self, tmp_path):
        path = write(
            tmp_path / "checkpoint-5", {"config.json": b"{}", "model.safetensors": safetensors()}
        )
        assert state(path, "hf-trainer") == "torn"
        assert state(path) == "complete"  # by itself it is a model


class TestDeepSpeed:
    def model(self, **more):
        said = {
            "dp_world_size": 2,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": 1}},
            "global_steps": 7,
        }
        return checkpoints.torch_file({**said, **more})

    def folder(self, path, **more):
        optim = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": TORCH for rank in range(2)}
        return write(path, {"mp_rank_00_model_states.pt": self.model(**more), **optim})

    def test_layers_are_those_that_have_parameters(self, tmp_path):
        shapes = [{"0.weight": (1,), "2.bias": (1,), "tied_modules.embed.weight": (1,)}]
        path = self.folder(tmp_path / "global_step7", param_shapes=shapes)
        write(path, {"layer_00-model_states.pt": TORCH})
        assert "layer_02-model_states.pt" in judge_path(str(path))[1].reason
        write(path, {"layer_02-model_states.pt": TORCH})
        assert state(path) == "complete"

    def test_every_expert_of_every_layer_is_missed(self, tmp_path):
        gates = {f"{layer}.deepspeed_moe.gate.wg.weight": 1 for layer in range(2)}
        path = self.folder(tmp_path / "global_step7", num_experts=[2, 2], module=gates)
        names = [
            f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            for layer in range(2)
            for expert in range(2)
        ]
        write(path, dict.fromkeys(names, TORCH))
        assert state(path) == "complete"
        os.unlink(path / names[-1])
        os.unlink(path / names[-2])  # the whole last layer
        assert state(path) == "torn"

    def test_files_of_two_steps_are_no_checkpoint(self, tmp_path):
        path = self.folder(tmp_path / "global_step7", mp_world_size=2)
        write(path, {f"zero_pp_rank_{rank}_mp_rank_01_optim_states.pt": TORCH for rank in range(2)})
        write(path, {"mp_rank_01_model_states.pt": self.model(global_steps=3, mp_world_size=2)})
        assert "of step 3" in judge_path(str(path))[1].reason

    def test_a_model_file_of_another_step_than_hpctrains_own_record_is_a_mixture(self, tmp_path):
        path = self.folder(tmp_path / "global_step7", hpctrain={"iteration": 7})
        write(path, {"hpctrain.json": b'{"iteration": 7}'})
        assert state(path) == "complete"
        write(path, {"mp_rank_00_model_states.pt": self.model(hpctrain={"iteration": 5})})
        assert state(path) == "torn" and "of step 5" in judge_path(str(path))[1].reason

    def test_universal_checkpoints_hold_the_same_states_of_each_parameter(self, tmp_path):
        parts = {
            f"zero/{name}/{kind}.pt": TORCH for name in ("a", "b") for kind in ("fp32", "exp_avg")
        }
        path = write(
            tmp_path / "global_step7_universal",
            {**parts, "mp_rank_00_model_states.pt": self.model()},
        )
        assert state(path) == "complete"
        os.unlink(path / "zero" / "b" / "exp_avg.pt")
        assert state(path) == "torn"


class TestMegatronLegacy:
    @pytest.mark.parametrize("form", ["mp_rank_{0:02d}_{1:03d}_{2:03d}", "mp_rank_{0:02d}_{2:03d}"])
    def test_expert_ranks_are_ranks(self, tmp_path, form):
        stages = 2 if "{1" in form else 1
        names = {form.format(t, p, e) for t in range(2) for p in range(stages) for e in range(2)}
        path = write(
            tmp_path / "iter_0001000", {f"{name}/model_optim_rng.pt": TORCH for name in names}
        )
        assert state(path, "megatron") == "complete"
        os.unlink(path / max(names) / "model_optim_rng.pt")
        assert state(path, "megatron") == "torn"

    def test_the_arguments_in_a_file_say_how_many_there_must_be(self, tmp_path):
        sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
        said = {"args": argparse.Namespace(**sizes), "iteration": 1000}
        buffer = tmp_path / "file"
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(said, protocol=2))
        path = write(
            tmp_path / "iter_0001000", {"mp_rank_00/model_optim_rng.pt": buffer.read_bytes()}
        )
        assert "`mp_rank_01/model_optim_rng.pt`" in judge_path(str(path))[1].reason


class TestSmallFilesThatLoadersParse:
    """A settings file that its loader parses is whole only when it can be parsed."""

    def nanotron(self, path):
        files = {
            "checkpoint_metadata.json": b'{"tp": 1}',
            "optimizer/optimizer_config.json": b'{"type": "x"}',
            "optimizer/optimizer_pp-0-of-1_dp-0-of-1_tp-0-of-1_exp-0-of-1.pt": TORCH,
            "lr_scheduler/lr_scheduler_pp-0-of-1_dp-0-of-1_tp-0-of-1_exp-0-of-1.pt": TORCH,
            "model/model/norm/pp_block/model_weight.safetensors": safetensors(),
        }
        return write(path, files), ("checkpoint_metadata.json", "optimizer/optimizer_config.json")

    def megatron(self, path):
        files = {"metadata.json": b'{"sharded_backend": "torch_dist"}', "common.pt": TORCH}
        return write(dcp(path, __0_0=20), files), ("metadata.json",)

    def ours(self, path):
        record = {"hpctrain.json": b'{"iteration": 7, "config": {}}'}
        return write(dcp(path, __0_0=20), record), ("hpctrain.json",)

    @pytest.mark.parametrize("kind", ["nanotron", "megatron", "ours"])
    @pytest.mark.parametrize(
        "damage", [lambda c: b"", lambda c: c[:-1], lambda c: c[:-3] + b"\0\0\0"]
    )
    def test_one_that_is_cut_or_ends_in_zeros_is_torn(self, tmp_path, kind, damage):
        path, names = getattr(self, kind)(tmp_path / {"ours": "step-7"}.get(kind, "7"))
        assert state(path) == "complete"
        for name in names:
            content = (path / name).read_bytes()
            (path / name).write_bytes(damage(content))
            assert state(path) == "torn", name
            (path / name).write_bytes(content)

    @pytest.mark.parametrize("layout", [None, "dcp"])
    def test_hpctrains_own_record_of_another_step_is_a_mixture(self, tmp_path, layout):
        path, _ = self.ours(tmp_path / "step-8")
        assert state(path, layout) == "torn"

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("model: {tp: 2}\ncheckpoint: {save_rng: true}\n", "complete"),
            ("model:\n  tp: 2", "complete"),
            ("{}", "complete"),
            ("model: {tp: 2}\ncheckpoint: {save", "torn"),
            ("model:\n  tp: 2\nchec", "torn"),
            ("model: {tp: 2}\n\0\0\0", "torn"),
            ("", "torn"),
        ],
    )
    def test_bridges_configuration_is_cut_where_no_yaml_can_end(self, tmp_path, text, answer):
        path, _ = self.megatron(tmp_path / "iter_0000007")
        write(path, {"train_state.pt": TORCH, "run_config.yaml": text.encode()})
        assert state(path) == state(path, "megatron") == answer

    @pytest.mark.parametrize("beside", [{}, {"metadata.json": b"{}", "common.pt": TORCH}])
    def test_bridges_own_state_is_whole_or_the_checkpoint_is_not(self, tmp_path, beside):
        path = write(dcp(tmp_path / "iter_0000007", __0_0=20), beside)
        write(path, {"train_state.pt": TORCH, "run_config.yaml": b"model: {}\n"})
        assert state(path, "megatron") == "complete"
        for content in (b"", TORCH[:-5]):
            (path / "train_state.pt").write_bytes(content)
            assert state(path, "megatron") == "torn"


class TestTheOneBeside:
    """The checkpoint before tells what the program writes, and only that."""

    def test_a_lone_model_beside_a_trainers_checkpoint_is_one_that_was_cut_off(self, tmp_path):
        hf(tmp_path / "checkpoint-4", step=4)
        path = write(
            tmp_path / "checkpoint-5", {"config.json": b"{}", "model.safetensors": safetensors()}
        )
        assert state(path) == "torn"

    def test_torch_dist_is_told_by_its_index_when_all_else_is_gone(self, tmp_path):
        path = dcp(tmp_path / "copy-of-7", __0_0=20)
        told = Metadata({("w", 0): _StorageInfo("__0_0.distcp", 0, 20)})
        told.all_local_plans = []
        (path / ".metadata").write_bytes(pickle.dumps(told))
        form, verdict = judge_path(str(path))
        assert verdict.state == "torn" and "`metadata.json`" in verdict.reason

    def test_open_instruct_misses_what_the_one_before_has(self, tmp_path):
        files = {
            "model.safetensors": safetensors(),
            "optimizer.bin": TORCH,
            "random_states_0.pkl": TORCH,
        }
        files["COMPLETED"] = b"COMPLETED"
        write(tmp_path / "step_2", {**files, "scheduler.bin": TORCH})
        path = write(tmp_path / "step_4", files)
        assert state(path) == "torn"

    def test_a_file_of_nobodys_in_the_one_before_is_not_missed(self, tmp_path):
        made, _ = TestSmallFilesThatLoadersParse().nanotron(tmp_path / "5")
        write(made, {"model/model/.rsync-filter": b"x", "slurm-1.out": b"x"})
        path, _ = TestSmallFilesThatLoadersParse().nanotron(tmp_path / "7")
        assert state(path) == "complete"


class TestWhatNobodyKnows:
    def test_it_is_unknown_and_nothing_at_all_is_torn(self, tmp_path):
        assert (
            state(write(tmp_path / "step-5", {"shard.orbax": b"x", "manifest.ocdbt": b"y"}), "dcp")
            == "unknown"
        )
        (tmp_path / "step-6").mkdir()
        assert state(tmp_path / "step-6", "dcp") == "torn"

    @pytest.mark.parametrize("odd", ["pipe", "socket", "device", "loop", "dangling"])
    def test_odd_files_hold_no_judge(self, tmp_path, odd, short_socket):
        path = dcp(tmp_path / "step-5", __0_0=20)
        os.unlink(path / "__0_0.distcp")
        name = str(path / "__0_0.distcp")
        made = {
            "pipe": lambda: os.mkfifo(name),
            "socket": lambda: short_socket(name),
            "device": lambda: os.symlink("/dev/zero", name),
            "loop": lambda: os.symlink(name, name),
            "dangling": lambda: os.symlink("nowhere", name),
        }
        made[odd]()
        assert state(path) == "torn"


@pytest.fixture
def short_socket(tmp_path):
    """Makes a socket file, whose path may be longer than a socket's may."""

    def make(path):
        there = os.getcwd()
        os.chdir(os.path.dirname(path))
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(os.path.basename(path))
        finally:
            os.chdir(there)

    return make
