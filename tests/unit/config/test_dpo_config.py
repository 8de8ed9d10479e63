"""The DPO trainer's config: the seed's file is understood, and every mistake is said at once with
its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.config.trainers.dpo import find_source, load_config

SEED = """\
policy_name: ./policy
ref_name: ./policy
precision: bf16
dataset:
  dataset_name: Intel/orca_dpo_pairs
  subset: 100
  max_len: 512
dpo_training:
  batch_size: 4
  epochs: 1
  learning_rate: 5e-7
  beta: 0.1
  log_steps: 10
  fsdp: true
mount_dir: mounts/output
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    cache = tmp_path / "hf" / "hub" / "datasets--Intel--orca_dpo_pairs"
    (cache / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path


def test_a_config_dpo_yaml_is_understood_as_it_is(folder: Path) -> None:
    (folder / "config_dpo.yaml").write_text(SEED)

    config = load_config(str(folder / "config_dpo.yaml"))

    assert config.training["learning_rate"] == 5e-7 and config.training["fsdp"] is True
    assert config.dataset["dataset_name"].endswith("snapshots/" + "a" * 40)
    assert config.mount_dir == str(folder / "mounts/output")
    assert config.train_batch_size(8) == 32


def test_every_mistake_is_said_at_once_with_its_line(folder: Path) -> None:
    text = SEED.replace("precision: bf16", "precision: fp8").replace(
        "batch_size: 4", "batch_size: 0"
    )
    text = text.replace("ref_name: ./policy", "ref_name: nobody/nothing").replace(
        "fsdp: true", "fdsp: true"
    )
    (folder / "c.yaml").write_text(
        text.replace("beta: 0.1", "beta: 0") + "  stop_signal: NOPE\n".replace("  ", "")
    )

    with pytest.raises(UsageError) as caught:
        load_config(str(folder / "c.yaml"))

    found = {
        problem.where.removeprefix(str(folder) + "/"): problem for problem in caught.value.problems
    }
    assert sorted(found) == [
        "c.yaml:12:9",
        "c.yaml:14:3",
        "c.yaml:16:1",
        "c.yaml:2:11",
        "c.yaml:3:12",
        "c.yaml:9:15",
    ]
    assert "hf download nobody/nothing" in found["c.yaml:2:11"].hint
    assert "did you mean `fsdp`" in found["c.yaml:14:3"].hint


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "policy_name: [1]", "dataset: 3\ndpo_training: x\n", "a: {b: \x00}"]
)
def test_nonsense_is_refused_and_never_a_traceback(folder: Path, text: str) -> None:
    (folder / "c.yaml").write_text(text)

    with pytest.raises(UsageError):
        load_config(str(folder / "c.yaml"))


def test_a_folder_of_the_same_form_as_a_hub_id_wins(folder: Path) -> None:
    (folder / "Intel" / "orca_dpo_pairs").mkdir(parents=True)

    assert find_source("Intel/orca_dpo_pairs", str(folder), "datasets") == str(
        folder / "Intel/orca_dpo_pairs"
    )
    assert find_source("Intel/none", str(folder), "datasets") is None
    assert find_source("../../etc/none", str(folder), "datasets") is None


@pytest.mark.parametrize(
    "old,new,words",
    [
        (
            "learning_rate: 5e-7",
            "learning_rate: .nan",
            "`dpo_training.learning_rate: .nan` is no finite number",
        ),
        ("beta: 0.1", "beta: .inf", "is no finite number"),
        ("fsdp: true", "stop_signal: KILL", "not the name of a signal that a process can hear"),
        (
            "dataset_name: Intel/orca_dpo_pairs",
            "dataset_name: ''",
            "`dataset.dataset_name: ` is empty",
        ),
        ("policy_name: ./policy", "policy_name: ''", "`policy_name: ` is empty"),
    ],
)
def test_values_of_the_right_type_that_mean_nothing_are_refused(
    folder: Path, old: str, new: str, words: str
) -> None:
    (folder / "c.yaml").write_text(SEED.replace(old, new))

    with pytest.raises(UsageError) as caught:
        load_config(str(folder / "c.yaml"))
    (problem,) = caught.value.problems
    assert words in problem.what and problem.where.startswith(str(folder / "c.yaml:"))
