"""`hpctrain export` of a GPT-NeoX run on the real Slurm: its parser, its accounting of memory and
partitions, its srun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import checkpoints
import pytest

pytestmark = pytest.mark.slurm
ACCOUNT = "project_465000000"
# Called as NeoX's tools/ckpts/convert_neox_to_hf.py is; notes how, and writes what it writes.
CONVERTER = """
import json, os, struct, sys
out = sys.argv[sys.argv.index("--output_dir") + 1]
json.dump([sys.argv, os.environ["SLURM_STEP_ID"], len(os.sched_getaffinity(0))], open(os.path.join(out, "seen.json"), "w"))
open(os.path.join(out, "config.json"), "w").write("{}")
header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
open(os.path.join(out, "model.safetensors"), "wb").write(struct.pack("<Q", len(header)) + header + bytes(4))
"""


def test_a_neox_run_is_exported_by_a_job_on_the_sites_cpu_partition(idle, tmp_path):
    code, folder = tmp_path / "neo x", tmp_path / "check points"
    (code / "tools" / "ckpts").mkdir(parents=True)
    (code / "tools" / "ckpts" / "convert_neox_to_hf.py").write_text(CONVERTER)
    (tmp_path / "run.yaml").write_text(f"""\
name: ft
site: lumi
recipe: neox-sft
account: {ACCOUNT}
partition: standard-g
nodes: 1
time: 1h
checkpoint: {{dir: {json.dumps(str(folder))}}}
data: {{train: [/d/t], valid: [/d/v], test: [/d/u]}}
config:
  {{num_layers: 2, hidden_size: 64, num_attention_heads: 4, seq_length: 64, max_position_embeddings: 64, precision: fp32, train_iters: 10,
   train_micro_batch_size_per_gpu: 1, checkpoint_factor: 5, norm: rmsnorm, activation: swiglu, pos_emb: rotary, use_bias_in_mlp: false,
   use_bias_in_attn_linear: false, tokenizer_type: SPMTokenizer, vocab_file: /v.model, warmup: 0.0, pack_impl: k_bin_packed,
   optimizer: {{type: Adam, params: {{lr: 1.0e-5}}}}, loss_mask_pairs: [7, 7], loss_mask_alternating_individual: [8]}}
recipe_options: {{dir: {json.dumps(str(code))}, flavor: tilde, python: {json.dumps(sys.executable)}}}
""")
    hpctrain = [sys.executable, "-m", "hpctrain"]
    run = Path(idle.ok(*hpctrain, "render", cwd=tmp_path).strip()).parent
    folder.mkdir()
    checkpoints.save(str(folder), 5, dp=8, zero=0)

    found = json.loads(
        idle.ok(*hpctrain, "export", str(run), "-o", "models/ft", "--wait", "--json", cwd=tmp_path)
    )

    argv, step, cores = json.loads((tmp_path / "models" / "ft" / "seen.json").read_text())
    assert (
        argv[argv.index("--input_dir") + 1] == str(folder / "global_step5")
        and step == "0"
        and cores >= 1
    )
    said = Path(found["log"]).read_text()
    assert "1 parameters, F32" in said and "finished rc=0" in said
    job = idle.ok("scontrol", "show", "job", found["job_id"])
    assert "Partition=small" in job and "JobState=COMPLETED" in job and ",mem=5G," in job
    again = idle.run(*hpctrain, "export", str(run), "-o", "models/ft", cwd=tmp_path)
    assert again.returncode == 4
