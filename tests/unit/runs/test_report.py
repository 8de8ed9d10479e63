"""The report: one page that needs nothing else, from however much of a run there is."""

from __future__ import annotations

import json
import re
import struct
from html.parser import HTMLParser

import pytest

from hpctrain.base.errors import Refused
from hpctrain.runs.report.gather import Points, gather
from hpctrain.runs.report.tables import export, frames
from hpctrain.runs.report.write import write_report

LINE = (
    " iteration {i:8d}/{n:8d} | elapsed time per iteration (ms): 1000.0 | learning rate: 1.0E-05 |"
    " lm_loss: {loss} | grad norm: 1.0 | samples per second: 8.0 | number of skipped iterations:  "
    " 0 | number of nan iterations:   0 |\n"
)
EVIL = "<script>alert(1)</script>&\"'"


def steps(first, last, total=200, loss=lambda i: f"{2.5 - 0.005 * i:.6E}"):
    return "".join(LINE.format(i=i, n=total, loss=loss(i)) for i in range(first, last + 1))


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "a"
    (folder / "logs").mkdir(parents=True)
    plan = {
        "run": "a" + EVIL,
        "site": "lumi",
        "recipe": "command",
        "guard": {"target": 200},
        "job": {
            "time_s": 3600,
            "num_nodes": 4,
            "tasks_per_node": 8,
            "step_time_s": 1.0,
            "save_every": 50,
            "num_links": 2,
            "iterations": 200,
        },
        "cost": {
            "node_hours": 4.0,
            "gpu_hours": 32.0,
            "billed": 16.0,
            "unit": "GPU-hour",
            "formula": "f",
        },
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    common = {
        "exit_code": None,
        "nodes": "nid[1-4]",
        "reason": "",
        "checkpoint": None,
        "restart": 0,
    }
    records = [
        {
            **common,
            "event": "begin",
            "link": 1,
            "job_id": "11",
            "mode": "scratch",
            "iteration": 0,
            "time": "2026-11-20T10:00:00Z",
        },
        {
            **common,
            "event": "end",
            "link": 1,
            "job_id": "11",
            "mode": "scratch",
            "iteration": 100,
            "exit_code": 1,
            "time": "2026-11-20T10:03:00Z",
        },
        {
            **common,
            "event": "begin",
            "link": 2,
            "job_id": "12",
            "mode": "resume",
            "iteration": 100,
            "time": "2026-11-20T10:05:00Z",
        },
        {
            **common,
            "event": "end",
            "link": 2,
            "job_id": "12",
            "mode": "resume",
            "iteration": 200,
            "exit_code": 0,
            "time": "2026-11-20T10:07:00Z",
        },
    ]
    (folder / "links.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "logs" / "a-11.out").write_text(
        "hpctrain: job 11, restart 0, 4 nodes: nid[1-4]\nhpctrain: starting: scratch, link 1, 32"
        " tasks, rendezvous x:1\n"
        + steps(1, 130)
        + f"[rank9]: RuntimeError: {EVIL} HIP out of memory. Tried\nhpctrain: finished rc=1\n"
    )
    (folder / "logs" / "a-12.out").write_text(
        "hpctrain: job 12, restart 0, 4 nodes: nid[1-4]\nhpctrain: starting: resume, link 2, 32"
        " tasks, rendezvous x:1\n"
        + steps(101, 200, loss=lambda i: "NAN" if i == 150 else f"{2.5 - 0.005 * i:.6E}")
        + "hpctrain: finished rc=0\n"
    )
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "data") and value
        ]


def test_the_page_is_whole_self_contained_and_escaped(run_dir, tmp_path):
    report = gather(str(run_dir), ask_slurm=False, now_s=1795250000.0)
    out = tmp_path / "page.html"
    png = tmp_path / "curves.png"
    write_report(report, str(out), str(png))
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "&lt;script&gt;" in text and "<script>" not in text
    assert page.tags.count("svg") == 2
    assert "http" not in re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]+"', "", text)
    assert struct.unpack(">II", png.read_bytes()[16:24])[0] > 800
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "curves.png",
        "page.html",
    ]


def test_lost_work_efficiency_and_bill_by_hand(run_dir):
    report = gather(str(run_dir), ask_slurm=False, now_s=1795250000.0)
    first, second = report.rows
    # Link 1 came to 130 and link 2 began at 101 again: 30 of its 130 seconds were for nothing.
    assert (
        first.lost_iterations,
        first.kept_iterations,
        first.elapsed_s,
        first.cause,
        first.node,
    ) == (30, 100, 180.0, "gpu_oom", "nid2")
    assert (second.lost_iterations, second.kept_iterations, second.elapsed_s) == (0, 100, 120.0)
    assert report.efficiency == pytest.approx((100 + 100) / (180 + 120))
    assert report.spent.used.billed == pytest.approx(16 * 300 / 3600)
    assert report.cadence["interval_s"] == pytest.approx(50)


def test_the_tables_hold_every_step_and_start(run_dir, tmp_path):
    report = gather(str(run_dir), ask_slurm=False)
    tables = frames(report)
    assert len(tables["steps"]) == 230 and len(tables["attempts"]) == 2
    paths = export(report, str(tmp_path / "csv"), "csv")
    assert len(paths) == 3
    assert (
        (tmp_path / "csv" / "steps.csv")
        .read_text()
        .splitlines()[0]
        .startswith("job_id,restart,link,iteration,loss")
    )


def test_a_file_that_is_no_report_is_not_overwritten(run_dir, tmp_path):
    report = gather(str(run_dir), ask_slurm=False)
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    with pytest.raises(Refused):
        write_report(report, str(mine))
    assert mine.read_text() == "my notes"
    write_report(report, str(tmp_path / "r.html"))
    write_report(report, str(tmp_path / "r.html"))


@pytest.mark.parametrize(
    "missing", ["plan.json", "links.jsonl", "logs/a-11.out", "logs/a-12.out", "everything"]
)
def test_half_a_run_directory_gives_a_page_that_says_what_it_could_not_see(
    run_dir, tmp_path, missing
):
    for name in (
        ["plan.json", "links.jsonl", "logs/a-11.out", "logs/a-12.out"]
        if missing == "everything"
        else [missing]
    ):
        (run_dir / name).unlink()
    (run_dir / "ledger.jsonl").write_text("{")
    report = gather(str(run_dir), ask_slurm=False)
    write_report(report, str(tmp_path / "page.html"))
    assert "could not see" in (tmp_path / "page.html").read_text()


def test_series_of_any_length_are_thinned_evenly_and_keep_what_is_not_finite():
    from hpctrain.triage.records import Place, Step

    points = Points(most=1000)
    for i in range(50_000):
        points.add(
            None, Step("neox", i, loss=float("nan") if i == 777 else 1.0), Place("x", 1), None
        )
    kept = [step.iteration for _, step, _ in points.rows]
    assert 400 <= len(kept) <= 1000
    gaps = [b - a for a, b in zip(kept, kept[1:])]
    assert max(gaps) <= 2 * points.every


def test_the_command_line(hpctrain, run_dir, tmp_path):
    done = hpctrain("report", run_dir, "--no-slurm", "--csv", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(run_dir / "report.html")
    assert hpctrain("report", tmp_path / "none").returncode == 2


def test_exported_types_do_not_depend_on_what_a_run_tells(run_dir, tmp_path):
    """So that the files of several runs can be read as one: a figure that no line tells is an empty
    number."""
    import pyarrow.parquet as parquet

    report = gather(str(run_dir), ask_slurm=False, now_s=1795250000.0)
    paths = {
        path.rsplit("/", 1)[-1]: path for path in export(report, str(tmp_path / "out"), "parquet")
    }
    types = {
        field.name: str(field.type) for field in parquet.read_table(paths["steps.parquet"]).schema
    }
    assert (types["iteration"], types["loss"], types["tokens_per_s"], types["link"]) == (
        "int64",
        "double",
        "double",
        "int64",
    )
    assert parquet.read_table(paths["attempts.parquet"]).column("first_iteration").to_pylist() == [
        1,
        101,
    ]


def test_only_what_the_logs_tell_is_drawn_and_starts_at_one_place_share_a_label(run_dir):
    from hpctrain.runs.report import figures

    for log in (run_dir / "logs").iterdir():
        log.write_text(re.sub(r" learning rate: [^|]*\|| grad norm: [^|]*\|", "", log.read_text()))
    (run_dir / "logs" / "a-12.out").write_text(
        (run_dir / "logs" / "a-12.out")
        .read_text()
        .replace("iteration      101/", "iteration        2/")
    )
    report = gather(str(run_dir), ask_slurm=False, now_s=1795250000.0)
    drawn = figures.curves(report)
    try:
        assert [axis.get_ylabel() for axis in drawn.axes] == ["loss", "samples/s"]
        assert [text.get_text() for text in drawn.axes[0].texts] == ["links 1, 2"]
    finally:
        figures.close(drawn)
    assert figures.missing(report) == ["learning rate", "gradient norm"]
    page = write_report(report, str(run_dir / "report.html"))[0]
    with open(page, encoding="utf-8") as file:
        assert "Not in the logs: learning rate, gradient norm." in file.read()


def test_a_cell_of_a_table_is_no_formula_of_a_spreadsheet():
    import pandas

    from hpctrain.runs.report.tables import _harmless

    words = ["=1+1", "+x", "@y", "-2+3", "-", "plain", None]
    frame = pandas.DataFrame({"name": pandas.array(words, dtype="string"), "loss": [-1.0] * 7})
    lines = _harmless(frame).to_csv(index=False).splitlines()
    assert lines[1:] == [
        "'=1+1,-1.0",
        "'+x,-1.0",
        "'@y,-1.0",
        "'-2+3,-1.0",
        "-,-1.0",
        "plain,-1.0",
        ",-1.0",
    ]
