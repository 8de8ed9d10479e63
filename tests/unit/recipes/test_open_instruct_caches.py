"""Caches of an open-instruct run: a folder for each content, nothing cut off is taken for whole,
nothing missing is trained without."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hpctrain.base.paths import shipped_dir, shipped_module
from hpctrain.runtime import hubcache
from hpctrain.runtime.files import Listing
from hpctrain.runtime.hubcache import Repo
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.runtime.settings import GuardError

_SPEC = importlib.util.spec_from_file_location(
    "hpctrain.runtime.prepare_step",  # where it is one of its modules in a run directory
    Path(shipped_dir("templates"), "open-instruct", "prepare_step.py"),
)
caches = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(caches)
COMMIT = "c" * 40
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

standin = shipped_module("sandbox", "standin")


class Case:
    """A run directory with its caches.json, a hub cache with one model and one data set, and a
    local data file."""

    def __init__(self, root: Path) -> None:
        self.home, self.run, self.data = (
            root / "hf",
            root / "run",
            root / "it's $(touch canary).jsonl",
        )
        self.repo = self.home / "hub" / "models--org--base"
        fill(self.repo / "snapshots" / COMMIT)
        write(self.repo / "refs" / "main", COMMIT)
        write(
            self.home / "datasets" / "org___my_data" / "default" / "0.0.0" / "abc" / "x.arrow", "x"
        )
        write(self.data, '{"messages": []}\n')
        self.said: list[str] = []
        self.settings: dict[str, Any] = {
            "schema_version": 1,
            "cache_dir": str(root / "cache"),
            "program": {"commit": "e" * 40, "entrypoint": "f.py"},
            "mixer": [str(self.data), "1.0", "org/MyData", "0.1"],
            "dataset": {"max_seq_length": 64},
            "tokenizer": "org/base",
            "model": {"name": "org/base", "folder": None, "alias": False, "revision": "main"},
            "hf_home": str(self.home),
            "offline": True,
            "reference": {"loss_type": "dpo_norm"},
            "needed": [
                {"what": "model", "kind": "model", "repo": "org/base", "revision": "main"},
                {"what": "data set", "kind": "dataset", "repo": "org/MyData", "revision": "main"},
            ],
        }

    def prepare(self, mode: str = "scratch", job: str = "7", state: str = "dead") -> dict[str, str]:
        write(self.run / "caches.json", json.dumps(self.settings))
        environ = {"HPCTRAIN_MODE": mode, "SLURM_JOB_ID": job}
        return caches.prepare(str(self.run), environ, self.said.append, lambda holder: state)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fill(folder: Path) -> None:
    for name in FILES:
        write(folder / name, name)


def torch_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"x")


def test_the_same_inputs_give_the_same_folders_and_each_change_another(case: Case) -> None:
    first = case.prepare()
    again = (
        case.prepare("resume")
        if torch_file(Path(first["REFERENCE_LOGPROBS_CACHE_PATH"]) / "k.pt") is None
        else {}
    )
    seen = {first["HPCTRAIN_DATASET_CACHE"]}

    assert again == first

    def changed() -> None:
        found = case.prepare()["HPCTRAIN_DATASET_CACHE"]
        assert found not in seen
        seen.add(found)

    # open-instruct's own key does not look into local files
    write(case.data, '{"messages": [1]}\n')
    changed()
    case.settings["dataset"]["max_seq_length"] = 65
    changed()
    case.settings["program"]["commit"] = "d" * 40
    changed()
    case.settings["mixer"][3] = "0.2"
    changed()
    write(case.home / "datasets" / "org___my_data" / "default" / "0.0.0" / "newer" / "x.arrow", "x")
    changed()
    fill(case.repo / "snapshots" / ("d" * 40))
    write(case.repo / "refs" / "main", "d" * 40)
    changed()


def test_the_reference_folder_follows_the_models_weights(case: Case, tmp_path: Path) -> None:
    model = tmp_path / "model"
    fill(model)
    case.settings["model"] = {
        "name": str(model),
        "folder": str(model),
        "alias": False,
        "revision": "main",
    }
    case.settings["tokenizer"] = str(model)
    first = case.prepare()
    write(model / "model.safetensors", "trained")
    second = case.prepare()
    case.settings["reference"] = {"loss_type": "dpo"}
    third = case.prepare()

    assert first["HPCTRAIN_DATASET_CACHE"] == second["HPCTRAIN_DATASET_CACHE"]
    assert len({found["REFERENCE_LOGPROBS_CACHE_PATH"] for found in (first, second, third)}) == 3


def test_a_large_file_is_read_once_for_all_links(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = case.prepare()
    monkeypatch.setattr(caches.hashlib, "sha256", _only_text(caches.hashlib.sha256))

    assert case.prepare() == first


def _only_text(real: Any) -> Any:
    """sha256 that takes its whole input at once, and refuses to be fed a file in parts."""

    class Sha:
        def __init__(self, data: bytes) -> None:
            self.hexdigest = real(data).hexdigest

    return lambda *data: Sha(*data) if data else pytest.fail("a file was read again")


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_of_the_hub_is_named_before_anything_starts(case: Case, name: str) -> None:
    path = case.repo / "snapshots" / COMMIT / name
    path.unlink()
    with pytest.raises(GuardError) as error:
        case.prepare()

    assert str(path) in str(error.value) and not Path(case.settings["cache_dir"]).exists()


def test_what_is_missing_is_named_in_one_go(case: Case) -> None:
    case.data.unlink()
    (case.repo / "refs" / "main").unlink()
    (case.home / "datasets").rename(case.home / "away")
    with pytest.raises(GuardError) as error:
        case.prepare()

    for words in ("refs/main", "org___my_data/*/*/*", case.data.name):
        assert words in str(error.value)


def test_every_shard_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write(
        tmp_path / "model.safetensors.index.json",
        json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}),
    )
    write(tmp_path / "m-1.safetensors", "x")

    assert hubcache.missing_files(str(tmp_path)) == ["m-2.safetensors"]
    write(tmp_path / "model.safetensors.index.json", "{")
    assert hubcache.missing_files(str(tmp_path)) == ["model.safetensors.index.json (damaged)"]


@pytest.mark.parametrize(
    "repo_id,folder",
    [
        ("org/MyData", "org___my_data"),
        ("allenai/tulu-3-sft-mixture", "allenai___tulu-3-sft-mixture"),
        ("GSM8K", "gsm8_k"),
    ],
)
def test_prepared_data_sets_are_found_under_the_name_that_datasets_gives_them(
    repo_id: str, folder: str
) -> None:
    assert hubcache.prepared_folder("/hf", repo_id) == f"/hf/datasets/{folder}"


def test_data_cut_off_while_they_were_written_are_renamed_and_whole_ones_stay(case: Case) -> None:
    folder = Path(case.prepare()["HPCTRAIN_DATASET_CACHE"])
    write(folder / "abc" / "data.arrow", "half")
    write(folder / "def" / "dataset_statistics.json", "{}")
    case.prepare(job="8")

    assert (folder / "interrupted-abc" / "data.arrow").read_text() == "half"
    assert not (folder / "abc").exists() and (folder / "def").exists()
    write(folder / "abc" / "data.arrow", "again")
    case.prepare(job="9")
    assert (folder / "interrupted-abc.2" / "data.arrow").read_text() == "again"


@pytest.mark.parametrize("state", ["alive", "ending", "unknown"])
def test_data_that_another_job_may_be_writing_are_left_alone(case: Case, state: str) -> None:
    folder = Path(case.prepare(job="7")["HPCTRAIN_DATASET_CACHE"])
    write(folder / "abc" / "data.arrow", "half")
    case.prepare(job="8", state=state)

    assert (folder / "abc").exists() and any("job 7 may be writing" in said for said in case.said)


def test_a_resume_without_its_reference_does_not_start(case: Case) -> None:
    folder = Path(case.prepare()["REFERENCE_LOGPROBS_CACHE_PATH"])
    with pytest.raises(GuardError, match="from the policy as trained so far"):
        case.prepare("resume")
    torch_file(folder / "0123.pt")
    case.prepare("resume")
    os.truncate(folder / "0123.pt", 20)
    with pytest.raises(GuardError):
        case.prepare("resume")

    assert (folder / "damaged-0123").stat().st_size == 20, "renamed, never deleted"


def test_the_rehearsals_stand_in_leaves_what_a_resume_and_a_finished_run_need(
    case: Case, tmp_path: Path
) -> None:
    standin.write_reference(case.prepare())
    case.prepare("resume")
    folder = str(tmp_path / "ckpt")
    name = standin.write_checkpoint(folder, "open-instruct", 4, {"data": 2})
    lacking = LAYOUTS["open-instruct"].export_faults(folder, name, Listing())
    standin.write_export(folder, "open-instruct")

    assert lacking and LAYOUTS["open-instruct"].export_faults(folder, name, Listing()) == []


def test_a_folder_is_shown_as_a_repository_beside_all_others(case: Case, tmp_path: Path) -> None:
    model = tmp_path / "my model"
    fill(model)
    case.settings["model"] = {
        "name": "local/my-model",
        "folder": str(model),
        "alias": True,
        "revision": "main",
    }
    for _ in range(2):
        view = Path(case.prepare()["HF_HUB_CACHE"])
        home = str(view.parent / "home")
        os.makedirs(home, exist_ok=True)
        if not os.path.islink(home + "/hub"):
            os.symlink(view, home + "/hub")

        for repo_id in ("local/my-model", "org/base"):
            assert hubcache.missing(home, Repo("model", repo_id, "main")) == []
    assert sorted(os.listdir(case.home / "hub")) == ["models--org--base"], (
        "the user's own cache is not written to"
    )


def test_a_damaged_caches_json_says_what_to_do(case: Case) -> None:
    write(case.run / "caches.json", "{")
    with pytest.raises(GuardError, match="render the run again"):
        caches.prepare(str(case.run), {}, print)
