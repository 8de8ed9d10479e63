"""templates/verl-gad/merge_start.py: whole models of the start's shards, made once, never inside
the start checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.base.paths import shipped_dir

SCRIPT = os.path.join(shipped_dir("templates"), "verl-gad", "merge_start.py")
# As LMOps' gad/tools/merge_model2hf.py: reads model shards and huggingface/config.json below
# --local_dir, writes beside it.
MERGE = """
import json, os, sys
folder = sys.argv[sys.argv.index("--local_dir") + 1]
assert json.load(open(os.path.join(folder, "huggingface", "config.json")))["architectures"]
count = 0
text = ""
while os.path.exists(os.path.join(folder, f"model_world_size_2_rank_{count}.pt")):
    text += open(os.path.join(folder, f"model_world_size_2_rank_{count}.pt")).read()
    count += 1
if os.environ.get("FAIL") == "half":
    sys.exit(0)
if os.environ.get("FAIL"):
    open(os.path.join(folder, "huggingface", "model.safetensors"), "w").write("half")
    sys.exit(3)
open(os.path.join(folder, "huggingface", "model.safetensors"), "w").write(text)
open("merged.log", "a").write(folder + "\\n")
"""


@pytest.fixture(params=["in huggingface", "beside the shards"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """global_step_2204 of two ranks, with configuration and tokenizer as this or that version of
    verl leaves them."""
    folder = tmp_path / "warm up" / "global_step_2204"
    for role in ("actor", "critic"):
        for kind in ("model", "optim", "extra_state"):
            for rank in range(2):
                path = folder / role / f"{kind}_world_size_2_rank_{rank}.pt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{role} {kind} {rank};")
        inside = (
            folder / role / "huggingface" if request.param == "in huggingface" else folder / role
        )
        inside.mkdir(exist_ok=True)
        (inside / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
        (inside / "tokenizer.json").write_text("{}")
    (folder / "data.pt").write_text("x")
    return folder


def merge(
    tmp_path: Path, start: Path | str, mode: str = "finetune", **environ: str
) -> tuple[int, str]:
    argv = [
        sys.executable,
        "-B",
        SCRIPT,
        str(tmp_path / "run" / "start-model"),
        "--",
        sys.executable,
        "-c",
        MERGE,
        "--local_dir",
        "@SHARDS",
    ]
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env={
            **os.environ,
            "HPCTRAIN_MODE": mode,
            "HPCTRAIN_CHECKPOINT": str(start),
            "HPCTRAIN_RUN_DIR": str(tmp_path),
            **environ,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_both_models_are_made_once_and_the_start_is_not_touched(
    tmp_path: Path, start: Path
) -> None:
    before = tree(start)
    code, said = merge(tmp_path, start)
    models = tmp_path / "run" / "start-model"

    assert code == 0, said
    assert (models / "actor" / "model.safetensors").read_text() == "actor model 0;actor model 1;"
    assert (models / "critic" / "model.safetensors").read_text() == "critic model 0;critic model 1;"
    assert (models / "actor" / "tokenizer.json").exists() and json.loads(
        (models / "actor" / "start.json").read_text()
    ) == {"checkpoint": "global_step_2204", "role": "actor"}
    assert tree(start) == before and sorted(path.name for path in models.iterdir()) == [
        "actor",
        "critic",
    ]
    after = tree(models)
    assert merge(tmp_path, start, mode="resume")[0] == 0
    assert tree(models) == after and (tmp_path / "merged.log").read_text().count("\n") == 2


def test_a_link_that_resumes_finds_the_start_again_if_a_model_is_missing(
    tmp_path: Path, start: Path
) -> None:
    (tmp_path / "hand_over.json").write_text(json.dumps({"checkpoint": str(start)}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / start.name).symlink_to(start)
    newest = {"HPCTRAIN_CHECKPOINT": "/data/global_step_9999"}
    code, said = merge(tmp_path, start, mode="resume", **newest)
    assert code == 0, said

    os.rename(start, tmp_path / "away")
    # both models are there: the start may be gone
    assert merge(tmp_path, start, mode="resume", **newest)[0] == 0
    (tmp_path / "away").rename(tmp_path / "run" / "copy")
    (tmp_path / "run" / start.name).unlink()
    (tmp_path / "run" / "copy").rename(tmp_path / "run" / start.name)
    os.rename(tmp_path / "run" / "start-model" / "critic", tmp_path / "old")
    assert (
        merge(
            tmp_path, start, mode="resume", HPCTRAIN_CHECKPOINT_DIR=str(tmp_path / "run"), **newest
        )[0]
        == 0
    )


@pytest.mark.parametrize(
    "fail,words", [("yes", "ended with exit code 3"), ("half", "its model has no weights")]
)
def test_a_merge_that_fails_leaves_no_model_and_may_be_repeated(
    tmp_path: Path, start: Path, fail: str, words: str
) -> None:
    before = tree(start)
    code, said = merge(tmp_path, start, FAIL=fail)

    assert code == 1 and words in said and "Traceback" not in said
    assert not (tmp_path / "run" / "start-model" / "actor").exists() and tree(start) == before
    assert merge(tmp_path, start)[0] == 0
    assert sorted(path.name for path in (tmp_path / "run" / "start-model").iterdir()) == [
        "actor",
        "critic",
    ]


def test_missing_shards_and_a_changed_start_are_refused(tmp_path: Path, start: Path) -> None:
    os.rename(start / "critic" / "model_world_size_2_rank_0.pt", start / "gone")
    code, said = merge(tmp_path, start)
    assert code == 1 and "does not hold the critic's shards" in said

    os.rename(start / "gone", start / "critic" / "model_world_size_2_rank_0.pt")
    assert merge(tmp_path, start)[0] == 0
    other = start.with_name("global_step_3000")
    os.rename(start, other)
    code, said = merge(tmp_path, other)
    assert (
        code == 1
        and "was made of global_step_2204, and the run starts from global_step_3000" in said
    )


def test_a_damaged_model_is_said_and_not_overwritten(tmp_path: Path, start: Path) -> None:
    assert merge(tmp_path, start)[0] == 0
    (tmp_path / "run/start-model/actor/model.safetensors").unlink()
    code, said = merge(tmp_path, start, mode="resume")

    assert code == 1 and "has no weights; move it away" in said


def test_nothing_is_written_through_a_link(tmp_path: Path, start: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "run" / "start-model").mkdir(parents=True)
    (tmp_path / "run" / "start-model" / "actor.hpctrain-work").symlink_to(outside)
    code, said = merge(tmp_path, start)

    assert code == 1 and "is a link" in said and list(outside.iterdir()) == []
