"""`logs`: the lines around the first failure, found without reading a long log line by line a
second time."""

from __future__ import annotations

import dataclasses
import itertools
import types

import pytest

from hpctrain.base import terminal
from hpctrain.runs import logs
from hpctrain.runs.diagnose import open_target
from hpctrain.runs.diagnosis import diagnose
from hpctrain.triage.engine import Engine
from hpctrain.triage.judge import judge
from hpctrain.triage.read import read_logs
from hpctrain.triage.thresholds import Thresholds


def a_log(path, before: int, after: int, width: int = 60) -> None:
    lines = [f"[rank{i % 3}] talk {i} " + "x" * width for i in range(1, before + 1)]
    lines.append("[rank1]: RuntimeError: HIP out of memory. Tried to allocate 2 GiB")
    lines += [f"[rank{i % 3}] more {i}" for i in range(after)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def incident_of(path):
    engine = Engine()
    read_logs(engine, [str(path)])
    return judge(engine).cause


@pytest.mark.parametrize("before", [0, 3, 40, 9000])
@pytest.mark.parametrize(
    "told", ["by its offset", "by its number alone", "by an offset of a longer file"]
)
def test_the_lines_around_the_failure_are_the_same_however_they_are_found(tmp_path, before, told):
    path = tmp_path / "r-1.out"
    a_log(path, before, 30)
    incident = incident_of(path)
    assert incident.event.offset is not None
    if told != "by its offset":
        offset = None if "number" in told else 10**12
        incident = dataclasses.replace(
            incident, event=dataclasses.replace(incident.event, offset=offset)
        )
    shown = logs.failing_lines(incident, before=4, after=2).lines
    mine = [i for i in range(1, before + 1) if i % 3 == 1][-4:]
    assert [line.split("] ")[1].split(" x")[0] for line in shown[: len(mine)]] == [
        f"talk {i}" for i in mine
    ]
    assert shown[len(mine)].startswith(f"> {before + 1}: [rank1]: RuntimeError: HIP out of memory")
    assert len(shown) == len(mine) + 3


def test_of_a_long_log_only_the_part_around_the_failure_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "r-1.out"
    a_log(path, 60_000, 10)
    incident = incident_of(path)
    read = []
    real = logs._lines
    monkeypatch.setattr(
        logs, "_lines", lambda file: (read.append(line) or line for line in real(file))
    )
    logs.failing_lines(incident)
    assert len(read) < 6000


def test_reading_shows_how_far_it_is_and_the_first_failure_so_far(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r-1.out"
    a_log(path, 20_000, 20_000)
    told = []
    subject = open_target([str(path)], Thresholds())
    subject.diagnose(lambda *words: told.append(words))
    size = path.stat().st_size
    assert told[-1][:2] == (size, size)
    assert told[-1][2] == "gpu_oom at r-1.out:20001, rank 1"
    assert told[0][2] == ""
    clock = itertools.count(0, 60)
    monkeypatch.setattr(terminal, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    diagnose(open_target([str(path)], Thresholds()))
    shown = capsys.readouterr().err
    assert "reading logs: " in shown and "gpu_oom at r-1.out:20001" in shown
