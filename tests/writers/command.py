"""tools/checkpoints --seed S --num N [--writer NAME …] [--keep DIR]"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

from . import damages
from .campaign import Bench, Result
from .contract import Writer
from .damages import Damage
from .olmo import find_olmo
from .ranks import FORK
from .registry import writers

SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/checkpoints", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=300, help="damages, over all writers")
    parser.add_argument("--writer", action="append", help="only this one, or those that begin so")
    parser.add_argument("--case", type=int, help="only the damage of this number (with --writer)")
    parser.add_argument(
        "--each-file", action="store_true", help="take away each file in its turn instead"
    )
    parser.add_argument("--keep", help="keep the damaged folders in this directory")
    parser.add_argument("--jobs", type=int, default=2, help="writers at the same time")
    parser.add_argument("--json", help="add each result to this file, one JSON object a line")
    parser.add_argument("--times", action="store_true", help="say how long each writer took")
    parser.add_argument("--table", help="put the table into this file, between its markers")
    parser.add_argument("--list", action="store_true", help="only list the writers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    chosen = choose(args.writer)
    if args.list:
        for one in chosen:
            about = next(kind.__doc__ for kind in type(one).__mro__ if kind.__doc__) or ""
            print(f"{one.name:30}{one.built:13}{about.splitlines()[0]}")
        return
    began = time.monotonic()
    settle()
    folder = tempfile.mkdtemp(prefix="checkpoints-", dir=SCRATCH)
    try:
        results, failures = campaign(chosen, args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(results)
    print(text)
    if args.table:
        put(args.table, text)
    print(f"\n{len(results)} damages, {len(chosen)} writers, {time.monotonic() - began:.0f} s")
    tell_wrong([one for one in results if one.wrong], failures)
    sys.exit(1 if failures or any(one.wrong for one in results) else 0)


def choose(wanted: list[str] | None) -> list[Writer]:
    known = writers()
    if not wanted:
        return list(known.values())
    chosen: dict[str, Writer] = {}
    for name in wanted:
        found = [name] if name in known else [one for one in known if one.startswith(name)]
        if not found:
            raise SystemExit(f"no writer is called {name}; there are: {', '.join(known)}")
        chosen.update({one: known[one] for one in found})
    return list(chosen.values())


def settle() -> None:
    """What all processes forked from this one shall find: one thread, no GPU, no network."""
    gc.disable()  # in this process, which does nothing but import
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    find_olmo()
    import torch

    torch.set_num_threads(1)


def shares(chosen: list[Writer], num: int) -> dict[str, range]:
    """How many damages each writer gets: as many as its loader is cheap, the first of each
    first."""
    total = sum(one.weight for one in chosen)
    counts = {one.name: num * one.weight // total for one in chosen}
    for one in chosen[: num - sum(counts.values())]:
        counts[one.name] += 1
    return {name: range(count) for name, count in counts.items()}


def campaign(
    chosen: list[Writer], args: argparse.Namespace, folder: str
) -> tuple[list[Result], list[str]]:
    """All results, and what kept a writer from being judged at all."""
    numbers = shares(chosen, args.num)
    waiting = list(chosen)
    running: dict[Connection, tuple[Any, str]] = {}
    results: list[Result] = []
    failures: list[str] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            writer = waiting.pop(0)
            todo = (
                range(args.case, args.case + 1) if args.case is not None else numbers[writer.name]
            )
            writer.get_ready()
            gc.freeze()  # else each process would touch, and so copy, all that was imported
            ours, theirs = FORK.Pipe(duplex=False)
            process = FORK.Process(target=work, args=(writer, todo, args, folder, theirs))
            process.start()
            theirs.close()
            running[ours] = (process, writer.name)
        for end in wait(list(running)):
            assert isinstance(end, Connection)
            process, name = running[end]
            try:
                got = end.recv()
            except EOFError:
                process.join()
                del running[end]
                continue
            if isinstance(got, str):
                failures.append(f"{name}: {got}")
            else:
                results.append(got)
                if args.json:
                    with open(args.json, "a", encoding="utf-8") as stream:
                        stream.write(json.dumps(asdict(got)) + "\n")
    return results, failures


def work(
    writer: Writer, todo: range, args: argparse.Namespace, folder: str, end: Connection
) -> None:
    """One writer's part, in a process of its own."""
    gc.enable()
    bench = Bench(writer, folder)
    began = ready = time.monotonic()
    try:
        bench.prepare()
        ready = time.monotonic()
        if args.each_file:
            for result in each_file(bench):
                end.send(result)
        else:
            for result in bench.results(args.seed, iter(todo), args.keep):
                end.send(result)
    except Exception as error:
        if os.path.exists(bench.log):
            with open(bench.log, encoding="utf-8", errors="replace") as stream:
                sys.stderr.write(f"--- log of {writer.name}\n{stream.read()[-4000:]}\n")
        traceback.print_exc()
        end.send(f"{type(error).__name__}: {error}")
    finally:
        bench.close()
        if args.times:
            now, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = used.ru_utime + used.ru_stime
            line = (
                f"{writer.name}: {ready - began:.1f} s to write, {now - ready:.1f} s, {cpu_s:.1f}"
                " CPU-s"
            )
            print(line, file=sys.stderr)
        end.close()
        os._exit(0)


def each_file(bench: Bench) -> Any:
    """The newest checkpoint without each of its files in turn, and as it is."""
    name = bench.names[-1]
    for number, lost in enumerate([None, *damages.files_of(os.path.join(bench.whole, name))]):
        top = os.path.join(bench.folder, f"case-{number}")
        root = os.path.join(top, bench.writer.root_name)
        damages.copy_tree(os.path.dirname(bench.whole), top)
        if lost is not None:
            os.unlink(os.path.join(root, name, lost) if lost else os.path.join(root, name))
        done = Damage("none" if lost is None else "gone", lost or "")
        yield bench.judged(root, name, done, f"file {number}")
        shutil.rmtree(top)


def table(results: list[Result]) -> str:
    """Writer by writer: how many were whole and how many torn by its loader, and what hpctrain said
    of each."""
    loader = ("whole", "torn", "beyond", "partial")
    states = ("complete", "torn", "unknown", "unreadable")
    choices = ("goes on", "refuses", "starts over")
    head = (
        "writer",
        "files by",
        "damages",
        *loader,
        *(f"said {one}" for one in states),
        *choices,
        "wrong",
    )
    rows, known = [head], writers()
    for name in [*dict.fromkeys(one.writer for one in results), "all"]:
        mine = [one for one in results if name in (one.writer, "all")]
        counts = Counter(value for one in mine for value in ("l " + one.truth, "s " + one.state))
        counts.update("c " + one.choice for one in mine)
        keys = [f"l {one}" for one in loader] + [f"s {one}" for one in states]
        keys += [f"c {one}" for one in choices]
        made = known[name].built or "its framework" if name in known else ""
        numbers = [made, len(mine), *(counts[key] for key in keys), sum(one.wrong for one in mine)]
        rows.append((name, *map(str, numbers)))
    rows.insert(1, tuple("---" for _ in head))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in rows
    )


def put(path: str, text: str) -> None:
    """Put the table into a document, between its markers."""
    with open(path, encoding="utf-8") as stream:
        before, rest = stream.read().split("<!-- table -->\n", 1)
    after = rest.split("<!-- end -->\n", 1)[1]
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(f"{before}<!-- table -->\n{text}\n<!-- end -->\n{after}")


def told(one: Result) -> str:
    seed, _, number = one.case.partition("/")
    again = f"--seed {seed} --writer {one.writer} --case {number}" if number else one.case
    fault = f"\n    its guard {one.fault}" if one.fault else ""
    return (
        f"{one.writer} [{one.kind}] {one.what}\n    its loader: {one.truth} {one.why}\n"
        f"    hpctrain: {one.state} {one.reason}{fault}\n    again: tools/checkpoints {again}"
    )


def tell_wrong(wrong: list[Result], failures: list[str]) -> None:
    for one in wrong:
        print("\nWRONG", told(one))
    for text in failures:
        print("\nNOT JUDGED", text)
