"""The proof of the layouts: checkpoints that the frameworks wrote themselves, damaged, judged by
their own loaders.

How the campaign counts is tested first; a campaign that finds nothing wrong must be able to.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from writers.campaign import Result, folder_fault
from writers.damages import KINDS, Damager, copy_tree, damage, damage_tracker, files_of
from writers.ours import Decision
from writers.trees import MegatronLegacy

TESTS = Path(__file__).parent.parent


def tree(top: Path) -> dict[str, bytes]:
    return {name: (top / name).read_bytes() for name in files_of(str(top))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of two ranks and the tracker, of other content and length at each step."""
    root = tmp_path / "whole"
    for step in (2, 4):
        for rank in (0, 1):
            path = root / f"iter_{step:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            path.write_bytes(bytes([step, rank, 7]) * (2000 + 10 * step))
        (root / f"iter_{step:07d}" / "metadata.json").write_text(f'{{"step": {step}}}')
    (root / "latest_checkpointed_iteration.txt").write_text("4")
    return root


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "foreign")])
def test_each_kind_of_damage_takes_something_away_and_touches_no_original(
    kind: str, folder: Path
) -> None:
    before = tree(folder)
    for seed in range(20):
        copy = folder.parent / f"copy-{seed}"
        copy_tree(str(folder), str(copy))
        damager = Damager(str(copy), "iter_0000004", "iter_0000002", random.Random(seed))
        done = damager.do(kind)
        whole, damaged = tree(folder / "iter_0000004"), tree(copy / "iter_0000004")
        kept = all(damaged.get(name) == content for name, content in whole.items())
        assert done and (not kept or done.kind == "two copies"), (seed, done)
        assert tree(copy / "iter_0000002") == tree(folder / "iter_0000002")
    assert tree(folder) == before


def test_a_foreign_file_leaves_every_other_as_it_was(folder: Path) -> None:
    copy_tree(str(folder), str(folder.parent / "copy"))
    damager = Damager(str(folder.parent / "copy"), "iter_0000004", None, random.Random(1))
    assert damager.do("foreign")
    damaged = tree(folder.parent / "copy" / "iter_0000004")
    assert set(damaged) > set(tree(folder / "iter_0000004"))
    assert tree(folder / "iter_0000004").items() <= damaged.items()


def test_one_seed_is_one_damage(folder: Path) -> None:
    done = []
    for turn in range(2):
        copy = str(folder.parent / f"copy-{turn}")
        copy_tree(str(folder), copy)
        dice = random.Random("1/x/7")
        done.append((damage(copy, "iter_0000004", "iter_0000002", dice), tree(Path(copy))))
    assert done[0] == done[1]


def test_a_stale_tracker_names_the_older_and_is_older_than_the_newest_save(folder: Path) -> None:
    tracker = folder / "latest_checkpointed_iteration.txt"
    kinds = set()
    for seed in range(60):
        tracker.write_text("4")
        kind = damage_tracker(MegatronLegacy(), str(folder), random.Random(seed))
        kinds.add(kind)
        if kind == "stale":
            assert tracker.read_text() == "2"
            newest = folder / "iter_0000004"
            assert all(
                os.stat(newest / one).st_mtime > tracker.stat().st_mtime
                for one in files_of(str(newest))
            )
        elif kind in ("empty", "away", "garbage"):
            assert tracker.read_bytes() != b"4"
        else:
            assert tracker.exists() == (kind == "kept")
    assert kinds == {"kept", "stale", "gone", "empty", "garbage", "away"}


@pytest.mark.parametrize(
    ("truth", "state", "wrong"),
    [
        ("whole", "complete", False),
        ("whole", "torn", True),
        ("whole", "unknown", False),
        ("whole", "unreadable", True),
        ("torn", "complete", True),
        ("torn", "torn", False),
        ("torn", "unknown", False),
        ("beyond", "complete", False),
        ("beyond", "torn", False),
        ("partial", "unknown", False),
        ("partial", "complete", True),
        ("partial", "torn", True),
    ],
)
def test_what_counts_as_wrong(truth: str, state: str, wrong: bool) -> None:
    assert Result("w", "1/1", "gone", "", truth, "", state, "").wrong == wrong


@pytest.mark.parametrize(
    ("decision", "old", "new", "fault"),
    [
        (Decision("new", "", ()), "whole", "whole", ""),
        (Decision("old", "", ("new",)), "whole", "torn", ""),
        (Decision("old", "", ()), "whole", "whole", "older than `new`"),
        (Decision("old", "", ("new",)), "whole", "whole", "moves `new`"),
        (Decision("new", "", ()), "whole", "torn", "goes on from `new`"),
        (Decision("new", "", ()), "whole", "partial", "goes on from `new`"),
        (Decision("", "", ()), "whole", "torn", "starts over beside `old`"),
        (Decision("", "", ("old", "new")), "torn", "torn", ""),
        (Decision("", "cannot be told", ()), "whole", "whole", ""),
        (Decision("new", "", ()), "whole", "beyond", ""),
        (Decision("old", "", ()), "whole", "beyond", ""),
    ],
)
def test_what_counts_as_a_wrong_choice(decision: Decision, old: str, new: str, fault: str) -> None:
    found = folder_fault(decision, {"old": old, "new": new}, {"old": 0, "new": 1})
    assert fault in found and bool(fault) == bool(found)


def test_a_copy_is_as_good_as_what_it_is_a_copy_of() -> None:
    ranks = {"old": 0, "new": 1, "last": 1}
    for chosen in ("new", "last"):
        truths = {"old": "whole", "new": "whole", "last": "whole"}
        assert not folder_fault(Decision(chosen, "", ()), truths, ranks)
    truths["last"] = "torn"
    assert "goes on from `last`" in folder_fault(Decision("last", "", ()), truths, ranks)
    truths |= {"new": "torn", "last": "whole"}
    assert "older than `last`" in folder_fault(Decision("old", "", ()), truths, ranks)


def test_300_damages_to_checkpoints_of_every_writer_and_no_wrong_answer() -> None:
    """The same command as tools/checkpoints; its output names the seed and case that reproduce a
    wrong answer."""
    done = subprocess.run(
        [sys.executable, "-m", "writers", "--seed", "2026", "--num", "300"],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert "300 damages" in done.stdout
