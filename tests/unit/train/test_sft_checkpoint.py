"""A checkpoint exists whole or not at all, wherever the writer dies; and nothing but our own old
ones is ever deleted."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpctrain.base import errors
from hpctrain.train.core import checkpoint
from hpctrain.train.core.checkpoint import Progress, prune, read_progress, save, write_latest

FILES = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "config.json",
    "hpctrain.json",
)


class Died(BaseException):
    """The process is gone: no handler of ours may run on."""


class Writer:
    """Writes what DeepSpeed writes, in the order in which it does."""

    def save_checkpoint(
        self, directory: str, tag: str, client_state: dict[str, Any], save_latest: bool
    ) -> None:
        assert not save_latest
        os.makedirs(os.path.join(directory, tag), exist_ok=True)
        for name in FILES[:2]:
            with open(os.path.join(directory, tag, name), "w") as file:
                file.write("whole")


def progress(iteration: int, run_id: str = "a") -> Progress:
    return Progress(run_id, iteration, iteration * 4, 1, 1, "bf16", "f", {"lr": 1.0})


def write(directory: Path, iteration: int, run_id: str = "a") -> str:
    return save(
        Writer(),
        str(directory),
        progress(iteration, run_id),
        {"config.json": b"{}"},
        lambda: None,
        0,
    )


def whole(path: Path) -> bool:
    return (
        all((path / name).is_file() for name in FILES) and (path / FILES[0]).read_text() == "whole"
    )


def test_a_death_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    for survive in range(60):
        directory = tmp_path / str(survive)
        write(directory, 10)
        left = survive
        with monkeypatch.context() as patch:
            for name in ("open", "fsync", "rename", "makedirs", "listdir"):
                real = getattr(os, name)

                def dying(*arguments: Any, real: Any = real, **keywords: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        raise Died
                    left -= 1
                    return real(*arguments, **keywords)

                patch.setattr(os, name, dying)
            try:
                write(directory, 20)
                calls = survive
                break
            except Died:
                pass
        latest = (directory / "latest").read_text()
        assert latest in ("global_step10", "global_step20")
        assert whole(directory / latest) and whole(directory / "global_step10")
        complete = [path.name for path in directory.glob("global_step*")]
        assert all(whole(directory / name) for name in complete)
        write(directory, 20)  # and the next try finds its way through the rests
        assert (directory / "latest").read_text() == "global_step20" and whole(
            directory / "global_step20"
        )
        assert not list(directory.glob("partial_*"))
    assert calls > 10


def test_a_link_or_directory_of_the_same_name_is_set_aside_and_never_written_into(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "precious").write_text("weights")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "global_step5").symlink_to(base)
    (directory / "partial_global_step5").symlink_to(base)

    write(directory, 5)
    write(directory, 5)

    assert [path.name for path in base.iterdir()] == ["precious"]
    assert (directory / "set_aside_global_step5").is_symlink()
    assert whole(directory / "set_aside_global_step5_2") and whole(directory / "global_step5")


def test_a_full_disk_is_told_in_the_system_s_words_and_its_rest_does_not_stay(
    tmp_path: Path,
) -> None:
    class Full(Writer):
        def save_checkpoint(
            self, directory: str, tag: str, client_state: dict[str, Any], save_latest: bool
        ) -> None:
            super().save_checkpoint(directory, tag, client_state, save_latest)
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                # As torch.save does: what the disk said is only the context of what it raises.
                raise RuntimeError(  # noqa: B904
                    "[enforce fail at inline_container.cc:672] . unexpected pos 57344 vs 57232"
                )

    write(tmp_path, 10)
    with pytest.raises(
        checkpoint.CannotSave, match="rank 0 cannot save `global_step20`: No space left on device"
    ):
        save(Full(), str(tmp_path), progress(20), {}, lambda: None, 0)

    bare = RuntimeError(
        "[enforce fail at inline_container.cc:672] . unexpected pos 143936 vs 143824"
    )
    assert checkpoint.describe_failure(bare).startswith("No space left on device, or a quota")
    assert checkpoint.describe_failure(ValueError()) == "ValueError"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step10", "latest"]
    assert (tmp_path / "latest").read_text() == "global_step10"


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint.check_writable(str(tmp_path / "new" / "folder"))

    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(errors.EnvironmentFault, match="cannot write here: Not a directory"):
        checkpoint.check_writable(str(tmp_path / "file" / "folder"))


def test_another_model_is_named_by_the_keys_that_differ_and_another_release_is_no_other_model(
    tmp_path: Path,
) -> None:
    then = {
        "hidden_size": 32,
        "rms_norm_eps": 1e-6,
        "old_key": 1,
        "transformers_version": "4.44",
        "use_cache": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(then))
    now = {**then, "transformers_version": "5.1", "use_cache": False, "new_key": 2}
    del now["old_key"]

    assert checkpoint.changed_model(str(tmp_path), now) == []
    assert checkpoint.changed_model(str(tmp_path), {**now, "hidden_size": 64}) == [
        "hidden_size 32 -> 64"
    ]
    assert checkpoint.changed_model(str(tmp_path / "nowhere"), now) == []


def test_latest_is_replaced_even_when_it_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "latest").symlink_to(tmp_path / "elsewhere")

    write_latest(str(tmp_path), "global_step1")

    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert (tmp_path / "latest").read_text() == "global_step1" and not (
        tmp_path / "latest"
    ).is_symlink()


def test_only_this_runs_own_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base, 1)
    directory = tmp_path / "run"
    for iteration in (2, 4, 6, 8):
        write(directory, iteration)
    write(directory, 3, run_id="another run")
    (directory / "global_step1").symlink_to(base / "global_step1")
    (directory / "global_step5").mkdir()
    write_latest(str(directory), "global_step2")

    deleted = prune(str(directory), "a", keep=2)

    # 2 is what `latest` names
    assert [os.path.basename(path) for path in deleted] == ["global_step4"]
    names = sorted(path.name for path in directory.glob("*_step*"))
    assert names == [f"global_step{n}" for n in (1, 2, 3, 5, 6, 8)]
    assert whole(base / "global_step1")


def test_progress_survives_the_file_and_a_broken_file_is_no_progress(tmp_path: Path) -> None:
    path = Path(write(tmp_path, 7))
    assert read_progress(str(path), Progress) == progress(7)

    values = json.loads((path / checkpoint.META).read_text())
    del values["data_content"], values["train_batch_size"]  # as earlier versions wrote it
    (path / checkpoint.META).write_text(json.dumps(values))
    assert read_progress(str(path), Progress) == progress(7)

    (path / checkpoint.META).write_text('{"run_id": "a", ')
    assert read_progress(str(path), Progress) is None
    assert read_progress(str(tmp_path / "nowhere"), Progress) is None
