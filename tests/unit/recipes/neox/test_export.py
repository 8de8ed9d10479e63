"""The job that runs NeoX's own converter: what it is told about the model, what it may touch, and
what comes out.

The stand-in converter is called as the real one is, records how, and writes weights in fp32
whatever it is asked for, as the real one does (gpt-neox ea7aefd: main() parses --precision and does
not pass it on).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import checkpoints
import pytest
import yaml
from needed import needed

from hpctrain.base.errors import EnvironmentFault, Refused, UsageError
from hpctrain.base.shell import quote
from hpctrain.jobs.neox_export import plan_export
from hpctrain.plan.load import Loaded
from hpctrain.plan.run_dir import run_files

CONVERTER = """
import json, os, struct, sys
import argparse
parser = argparse.ArgumentParser()
for name in ("input_dir", "config_file", "output_dir", "precision", "architecture"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
out = args.output_dir
if os.environ.get("BREAK") == "converter":
    sys.exit("ERROR: calculated vocab size")
json.dump({"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd()}, open(os.environ["SEEN"], "w"))
json.dump({"model_type": "llama", "torch_dtype": "float32"}, open(os.path.join(out, "config.json"), "w"))
header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
with open(os.path.join(out, "model.safetensors"), "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + b"\\0" * (20 if os.environ.get("BREAK") == "torn" else 24))
if os.environ.get("BREAK") == "taken":
    os.mkdir(os.environ["OUT"])
"""
LLAMA = {
    "norm": "rmsnorm",
    "pos_emb": "rotary",
    "activation": "swiglu",
    "use_bias_in_attn_linear": "false",
    "use_bias_in_mlp": "false",
    "use_bias_in_norms": "false",
    "no_weight_tying": "true",
}


def exported(planned) -> dict:
    return yaml.full_load(planned.plan.resolved.configs["config.export.yml"])


def refused(planned) -> str:
    decision = planned.decision("export.architecture")
    assert decision.value is None and "config.export.yml" not in planned.plan.resolved.configs
    return decision.reason


def test_the_converter_is_told_the_size_that_neox_makes_of_a_gated_mlp(neox):
    # 64512 is the fork's 30B model, whose published Hugging Face config has 21504.
    base = {**LLAMA, "intermediate_size": "64512"}

    # the fork's converter takes the third itself
    assert exported(neox(base=base))["intermediate_size"] == 64512
    upstream = neox(
        base=base,
        options={"flavor": "upstream"},
        run={"container": "/scratch/c.sif"},
        config=(
            "pack_impl: unpacked\ntrain_label_data_paths: [/l]\nvalid_label_data_paths:"
            " [/l]\ntest_label_data_paths: [/l]\n"
        ),
    )
    assert exported(upstream)["intermediate_size"] == 21504


def test_the_converter_is_told_every_default_that_it_does_not_share_with_neox(neox):
    found = exported(neox(base={**LLAMA, "pipe_parallel_size": None, "model_parallel_size": "1"}))

    assert found["pipe_parallel_size"] == 0  # its own default is 1: layer files that are not there
    assert found["rms_norm_epsilon"] == 1e-8  # its own is 1e-6
    assert found["rotary_emb_base"] == 10000 and found["model_parallel_size"] == 1
    assert found["intermediate_size"] == 3 * 8192  # 4 x 6144, two thirds of it for both halves


def test_a_gpt_neox_model_keeps_its_class(neox):
    planned = neox(base={"pos_emb": "rotary", "num_kv_heads": None, "gpt_j_residual": "true"})

    assert planned.decision("export.architecture").value == "neox"
    assert exported(planned)["intermediate_size"] == 4 * 6144


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({**LLAMA, "pos_emb": "alibi"}, "rotary positions"),
        ({**LLAMA, "rotary_pct": "0.25"}, "rotary_pct"),
        ({**LLAMA, "use_bias_in_attn_linear": "true"}, "use_bias_in_attn_linear"),
        ({**LLAMA, "activation": "geglu"}, "geglu"),
        ({"pos_emb": "rotary"}, "grouped-query"),
        ({"pos_emb": "rotary", "num_kv_heads": None, "use_bias_in_mlp": "false"}, "biases"),
        ({"pos_emb": "rotary", "num_kv_heads": None, "gpt_j_tied": "true"}, "gpt_j_tied"),
    ],
)
def test_a_model_that_the_converter_would_get_wrong_has_no_export_job(neox, base, words):
    assert words in refused(neox(base=base))


@pytest.fixture
def run(neox, tmp_path):
    """A run directory with two checkpoints, the newer of them torn; and a NeoX whose converter is
    the stand-in."""
    code = tmp_path / "my 'neox' $(touch canary)"
    (code / "tools" / "ckpts").mkdir(parents=True)
    (code / "tools" / "ckpts" / "convert_neox_to_hf.py").write_text(CONVERTER)
    folder = tmp_path / "check points"
    planned = neox(
        base={**LLAMA, "model_parallel_size": "1"},
        run={
            "site": "generic-cuda",
            "account": None,
            "partition": None,
            "nodes": "1",
            "gpus_per_node": "1",
            "container": None,
            "checkpoint": json.dumps({"dir": str(folder)}),
            "time": "1h",
            "estimate": "{memory_gib: 40}",
        },
        options={"dir": json.dumps(str(code)), "python": "python3", "flavor": "tilde"},
    )
    assert planned.said() == []
    for name, raw in run_files(Loaded(planned.plan, planned.inputs)).items():
        path = Path(planned.plan.run_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    folder.mkdir()
    checkpoints.save(str(folder), 10)
    checkpoints.save(str(folder), 20)
    os.truncate(folder / "global_step20" / "mp_rank_00_model_states.pt", 30)
    return Path(planned.plan.run_dir)


def convert(run_job, run, tmp_path, out="the model", **env):
    plan = plan_export(str(run), str(tmp_path / out))
    return run_job(
        run / "export.sbatch",
        args=plan.argv("")[-4:],
        env={"SEEN": str(tmp_path / "seen.json"), **env},
    )[0]


def test_the_newest_complete_checkpoint_goes_through_neoxs_own_converter(run, run_job, tmp_path):
    needed("torch")
    done = convert(
        run_job,
        run,
        tmp_path,
        CUDA_VISIBLE_DEVICES="0",
        PYTHONPATH=os.pathsep.join(__import__("sys").path),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    options = dict(zip(seen["argv"][1::2], seen["argv"][2::2]))
    assert options.pop("--output_dir").startswith(str(tmp_path / ".the model."))
    assert options == {
        "--input_dir": str(tmp_path / "check points" / "global_step10"),
        "--precision": "bf16",
        "--architecture": "llama",
        "--config_file": str(run / "config.export.yml"),
    }
    env = seen["env"]
    assert env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and env["CUDA_VISIBLE_DEVICES"] == ""
    assert "cast to BF16" in done.stdout and "6 parameters, BF16" in done.stdout
    assert (
        json.loads((tmp_path / "the model" / "config.json").read_text())["torch_dtype"]
        == "bfloat16"
    )
    assert (tmp_path / "the model" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob(".the model*")) and not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("converter", "calculated vocab size"),
        ("torn", "should have"),
        ("taken", "nothing is written"),
    ],
)
def test_a_conversion_that_fails_leaves_nothing_behind_and_nothing_is_overwritten(
    run, run_job, tmp_path, how, words
):
    plan = plan_export(str(run), str(tmp_path / "model"), precision="fp32")
    done, _ = run_job(
        run / "export.sbatch",
        args=plan.argv("")[-4:],
        env={"SEEN": str(tmp_path / "seen.json"), "BREAK": how, "OUT": str(tmp_path / "model")},
    )

    assert done.returncode != 0 and words in done.stdout + done.stderr
    assert not list(tmp_path.glob(".model*"))
    assert (tmp_path / "model").exists() == (how == "taken") and not list(
        (tmp_path / "model").glob("*")
    )


def test_an_export_that_exists_is_not_touched_by_a_job_submitted_by_hand(run, run_job, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("x")
    done, _ = run_job(
        run / "export.sbatch",
        args=[str(tmp_path / "model"), str(tmp_path / "check points" / "global_step10")],
    )

    assert done.returncode == 1 and "nothing is written over it" in done.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]
    done, _ = run_job(
        run / "export.sbatch",
        args=[str(tmp_path / "m2"), str(tmp_path / "check points" / "global_step20")],
    )
    assert done.returncode == 1 and "torn" in done.stdout


def test_dry_run_shows_the_job_and_writes_nothing(run, cli, tmp_path):
    before = sorted(tmp_path.rglob("*"))

    code, out, err = cli(
        "export", run, "-o", tmp_path / "model", "--dry-run", "--sbatch=--partition=large mem"
    )

    assert code == 0, err
    assert out.startswith("sbatch --mem=5G '--partition=large mem' ") and out.count("\n") == 1
    assert f"{quote(str(tmp_path / 'check points' / 'global_step10'))} '' bf16" in out
    assert "vocab_file: /scratch/tok/model.model` cannot be read here" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_exported_is_said_before_a_job_is_submitted(run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(Refused, match="exists"):
        plan_export(str(run), str(tmp_path / "there"))
    with pytest.raises(UsageError, match="not complete"):
        plan_export(str(run), str(tmp_path / "m"), name="20")
    with pytest.raises(UsageError, match="no checkpoint"):
        plan_export(str(run), str(tmp_path / "m"), name="77")
    with monkeypatch.context() as full:
        facts = os.statvfs(tmp_path)
        full.setattr(os, "statvfs", lambda path: os.statvfs_result((*facts[:4], 0, *facts[5:])))
        with pytest.raises(EnvironmentFault, match="left and the model takes"):
            plan_export(str(run), str(tmp_path / "m"))
    (tmp_path / "check points" / "global_step10" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UsageError, match="no complete checkpoint yet"):
        plan_export(str(run), str(tmp_path / "m"))
    (run / "export.sbatch").unlink()
    with pytest.raises(UsageError, match=r"has no export\.sbatch"):
        plan_export(str(run), str(tmp_path / "m"))
