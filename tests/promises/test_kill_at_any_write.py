"""A kill between any two writes of a save, on any rank, never leads to a wrong, mixed or lost
checkpoint."""

from __future__ import annotations

import itertools
import os
import shutil

import checkpoints
import pytest
import saves
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import layout_named
from hpctrain.runtime.link import Decision, decide, prepare
from hpctrain.runtime.settings import Settings
from hpctrain.runtime.survey import Survey, choose


def guard(folder, **changes):
    """What a link does as it starts: decide, repair; gives the decision."""
    found = Settings(
        "ft", "deepspeed", str(folder), None, Expected(), 1000, 3, None, True, "latest"
    )._replace(**changes)
    survey = Survey(found)
    choice = choose(survey)
    decided: Decision = decide(found, choice, [], 1, False)
    return prepare(found, survey, choice, decided, lambda text: None)


def loaded(folder):
    """What NeoX would load: the (step, lineage) pieces of the checkpoint that `latest` names; None
    when there is none."""
    try:
        with open(os.path.join(folder, "latest")) as stream:
            return checkpoints.lineages(os.path.join(folder, stream.read().strip()))
    except FileNotFoundError:
        return None


def whole(progress, tp, dp, zero):
    """Whether every shard of the save was written to its end, `latest` or not."""
    return all(
        done >= 3 * len(checkpoints.shard_names(rank, tp, dp, zero))
        for rank, done in enumerate(progress)
    )


# Each rank writes only its own files, so what lies there after a kill depends on how far each rank
# was, not on the order: all combinations of progress are all interleavings.
SHAPES = [(1, 1, 0, True), (1, 2, 1, True), (2, 2, 1, True), (2, 2, 1, False), (1, 2, 3, True)]


@pytest.mark.parametrize(("tp", "dp", "zero", "told"), SHAPES)
def test_every_interleaving_of_a_save_with_a_kill(tmp_path, tp, dp, zero, told):
    """After it the next link loads the new checkpoint when it is whole, else the one before; never
    anything else."""
    ranks = range(tp * dp)
    expected = Expected() if told else Expected(tp, 0, dp, zero)
    base = tmp_path / "base"
    checkpoints.save(str(base), 10, tp, dp, zero, lineage="old", told=told)
    count = 0
    for progress in itertools.product(
        *(range(checkpoints.num_writes(rank, tp, dp, zero) + 1) for rank in ranks)
    ):
        # Rank 0's own shards come before `latest`; four ranks' every combination would be 1008
        # folders: take each third.
        count += 1
        if tp * dp > 2 and count % 3:
            continue
        folder = tmp_path / "now"
        shutil.copytree(base, folder)
        shutil.copystat(base / "latest", folder / "latest")
        os.utime(folder / "latest", ns=(1, 1))
        checkpoints.partial_save(str(folder), 20, progress, tp, dp, zero, lineage="new", told=told)
        decided = guard(folder, expected=expected)
        number, lineage = (20, "new") if whole(progress, tp, dp, zero) else (10, "old")
        assert (decided.mode, decided.iteration) == ("resume", number), progress
        assert loaded(folder) == {(number, lineage)}, progress
        # And whatever the next save writes, it does not write into what was left.
        assert os.path.isdir(folder / "global_step20") == (number == 20), progress
        shutil.rmtree(folder)
    assert count == len(
        list(
            itertools.product(
                *(range(checkpoints.num_writes(rank, tp, dp, zero) + 1) for rank in ranks)
            )
        )
    )


@pytest.mark.parametrize("start", [True, False])
def test_every_kill_in_the_very_first_save(tmp_path, start):
    base = checkpoints.save(str(tmp_path / "base"), 50, 1, 2, lineage="base")
    before = checkpoints.snapshot(tmp_path / "base")
    for progress in itertools.product(range(9), range(4)):
        folder = tmp_path / "now"
        guard(folder, start=base) if start else folder.mkdir()
        checkpoints.partial_save(str(folder), 10, progress, 1, 2, lineage="new")
        decided = guard(folder, start=base if start else None)
        if whole(progress, 1, 2, 1):
            assert (decided.mode, loaded(folder)) == ("resume", {(10, "new")}), progress
        elif start:
            assert (decided.mode, loaded(folder)) == ("finetune", {(50, "base")}), progress
        else:
            assert (decided.mode, loaded(folder)) == ("scratch", None), progress
        shutil.rmtree(folder)
    assert checkpoints.snapshot(tmp_path / "base") == before


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kills=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6)), min_size=1, max_size=6))
def test_any_number_of_kills_one_after_another(tmp_path_factory, kills):
    """Links that are killed in a save again and again: progress is never lost and no two saves ever
    mix."""
    folder = str(tmp_path_factory.mktemp("kills"))
    tp, dp, at, best = 2, 1, 0, None
    for attempt, kill in enumerate(kills):
        step = at + 10
        progress = tuple(
            min(done, checkpoints.num_writes(rank, tp, dp)) for rank, done in enumerate(kill)
        )
        checkpoints.partial_save(folder, step, progress, tp, dp, lineage=str(attempt))
        decided = guard(folder, counter="greatest_folder" if attempt % 2 else "latest")
        if whole(progress, tp, dp, 1):
            best = (step, str(attempt))
        if best is None:
            assert decided.mode == "scratch"
            continue
        assert (decided.mode, decided.iteration) == ("resume", best[0])
        assert loaded(folder) == {best}
        names = [name for name in os.listdir(folder) if name.startswith("global_step")]
        assert max(int(name[11:]) for name in names) == best[0]  # what the fork would count from
        at = best[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("start", [True, False])
def test_the_guard_killed_at_any_of_its_own_writes_does_the_rest_the_next_time(
    tmp_path, monkeypatch, start
):
    """Every system call of the guard that changes something is cut off once; the next guard ends in
    the same state."""
    base = checkpoints.save(str(tmp_path / "base"), 50, 1, 2, lineage="base") if start else None

    def folder_before():
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        if start:
            guard(folder, start=base)
            os.unlink(folder / "latest")
            os.unlink(folder / "start-50")  # the run goes to 1000
        else:
            checkpoints.save(str(folder), 10, 1, 2, lineage="good")
        checkpoints.partial_save(str(folder), 20, [4, 2], 1, 2, lineage="torn")
        (folder / "latest").write_text("")
        return folder

    def state(folder):
        return sorted(
            (name, checkpoints.lineages(folder / name) if "global" in name else None)
            for name in os.listdir(folder)
            if not name.startswith(".")
        )

    folder = folder_before()
    guard(folder, start=base)
    wanted, wanted_loaded = state(folder), loaded(folder)
    calls = 0
    while True:
        folder = folder_before()
        left = [calls]

        def cut(name, left=left):
            real = getattr(os, name)

            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "symlink", "write", "fsync", "mkdir"):
                patch.setattr(os, name, cut(name))
            try:
                guard(folder, start=base)
                break
            except Killed:
                pass
        guard(folder, start=base)
        assert (state(folder), loaded(folder)) == (wanted, wanted_loaded), calls
        calls += 1
    assert calls >= 4


@pytest.mark.parametrize("name", saves.ALL)
def test_a_save_in_any_layout_is_complete_from_its_last_write_on_and_never_before(tmp_path, name):
    """Two ranks, each killed after any number of its writes; rank 0 waits where its framework
    does."""
    kind = saves.ALL[name]
    layout = layout_named("own" if kind.layout else name, kind.layout)
    before = kind.save(str(tmp_path), 3, 2, "a")
    for first, second in itertools.product(
        *(range(kind.num_writes(rank, 2) + 1) for rank in (0, 1))
    ):
        done = [
            advanced(kind, tmp_path, rank, writes) for rank, writes in ((1, second), (0, first))
        ]
        path = tmp_path / kind.folder_of(6)
        if not path.exists() or "barrier" in done[1] and "barrier" not in done[0]:
            shutil.rmtree(path, ignore_errors=True)
            continue
        verdict = layout.verdict(str(path), Listing(), Expected(), before)
        whole = all("whole" in one for one in done)
        assert (verdict.state == "complete") == whole, (done, verdict)
        shutil.rmtree(path)


def advanced(kind, folder, rank, writes):
    made = kind.writes(str(folder), 6, rank, 2, "b", 6)
    done = list(itertools.islice(made, writes))
    made.close()
    return done
