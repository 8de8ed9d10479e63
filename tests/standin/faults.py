"""The fault campaign: chains of the stand-in trainer on a real Slurm, hurt in every way, and judged
by what really happened.

  tools/faults --seed 1 --num 200 [--jobs 3] [--table docs/faults.md]

The trainer notes every step, every written shard and every fault outside the checkpoint folder
(`truth.jsonl`); the judgement uses that and never the guard's own opinion.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import saves
from fault_cluster import Cluster
from fault_kinds import KINDS, OF_TRACKER, SLOW, WORDS
from fault_run import Result, Run


def plan_faults(seed: int, num: int, of: tuple[str, ...] = KINDS) -> list[list[str]]:
    """`num` faults in groups of one to three, each kind as often as any other; one group is one
    chain."""
    chance = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < num:
        kinds += chance.sample(of, len(of))
    kinds = kinds[:num]
    groups = []
    while kinds:
        size = chance.choice([1, 2, 3])
        groups.append(kinds[:size])
        kinds = kinds[size:]
    return groups


def layout_for(number: int, kinds: list[str]) -> str:
    """Each layout in its turn; where the tracker is hurt, the next that has one."""
    names = list(saves.ALL)
    turn = names[number % len(names) :] + names
    with_tracker = [name for name in turn if saves.ALL[name].tracker]
    return with_tracker[0] if set(kinds) & set(OF_TRACKER) else turn[0]


def line(number: int, result: Result) -> str:
    """What became of one chain."""
    text = (
        f"{number:4d} {result.layout:10} {result.outcome or 'failed':8} links {result.links}"
        f" starts {result.starts} lost {result.lost_iterations:2d} {result.seconds:5.0f}s"
        f" {', '.join(result.faults)}"
    )
    text += "  UNTOLD: " + "; ".join(result.untold) if result.untold else ""
    return text + ("  WRONG: " + "; ".join(result.wrong) if result.wrong else "")


def campaign(
    seed: int,
    num: int,
    jobs: int,
    say=print,
    quick: bool = False,
    of: tuple[str, ...] = KINDS,
    keep: bool = False,
) -> list[Result]:
    """Run the faults, `jobs` chains at a time, each on a cluster that the others share; returns a
    result per chain.

    `quick`: no waiting for what takes Slurm long, and the chains whose faults do begin first.
    """
    top = Path(tempfile.mkdtemp(prefix="hpctrain-faults-"))
    cluster = Cluster(top / "sandbox", jobs + 1, f"faults-{os.getpid()}")
    results = []

    def one(item):
        number, kinds = item
        folder = top / f"run {number}'s"
        folder.mkdir()
        node = nodes.get() if quick else ""
        layout = layout_for(number, kinds)
        run = Run(cluster, folder, seed * 1000 + number, kinds, node, layout)
        try:
            result = run.play_all()
        except Exception as error:
            result = Result(
                run.seed, kinds, layout=layout, wrong=[f"{type(error).__name__}: {error}"]
            )
        finally:
            nodes.put(node)
        say(line(number, result))
        if not (result.wrong or keep):
            shutil.rmtree(folder, ignore_errors=True)
        return result

    nodes: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(1, jobs + 2):
        nodes.put(f"nid{number:06d}")
    pool, ended = ThreadPoolExecutor(jobs), threading.Event()
    threading.Thread(target=cluster.heal, args=(ended,), daemon=True).start()
    try:
        groups = list(enumerate(plan_faults(seed, num, of)))
        if quick:
            groups.sort(key=lambda item: sum(SLOW.get(kind, 1) for kind in item[1]), reverse=True)
        results = list(pool.map(one, groups))
    finally:
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)
        cluster.down()
        if results and not keep and not any(result.wrong for result in results):
            shutil.rmtree(top, ignore_errors=True)
        else:
            say(f"kept for a look: {top}")
    return results


def table(results: list[Result], command: str) -> str:
    """The campaign as a table for the documentation."""
    planned, played, failed = Counter(), Counter(), Counter()
    for result in results:
        planned.update(result.faults)
        played.update(result.played)
        failed.update(result.faults if result.wrong else [])
    lines = ["| fault | planned | met | chains with anything wrong |", "|---|---|---|---|"]
    lines += [
        f"| {WORDS[kind]} | {planned[kind]} | {played[kind]} | {failed[kind]} |"
        for kind in KINDS
        if planned[kind]
    ]
    lines += ["", "| layout | chains | faults met | chains with anything wrong |"]
    lines.append("|---|---|---|---|")
    for name in saves.ALL:
        mine = [result for result in results if result.layout == name]
        met, wrong = sum(len(one.played) for one in mine), sum(bool(one.wrong) for one in mine)
        lines.append(f"| `{name}` | {len(mine)} | {met} | {wrong} |")
    outcome = Counter(result.outcome for result in results)
    lost = [
        result.lost_iterations / max(len(result.played), 1) for result in results if result.outcome
    ]
    lines += [
        "",
        (
            f"`{command}`: {sum(planned.values())} faults planned, {sum(played.values())} met, in"
            f" {len(results)} chains; {outcome['reached']} reached their target,"
            f" {outcome['gave up']} gave up for a true reason,"
            f" {sum(bool(result.wrong) for result in results)} had anything wrong. Mean iterations"
            f" trained again per fault: {sum(lost) / max(len(lost), 1):.1f} (a checkpoint every 3)."
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Hurt chains on a real Slurm and judge what they did."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=200, help="faults in all")
    parser.add_argument("--jobs", type=int, default=3, help="chains at a time")
    parser.add_argument("--kinds", default=",".join(KINDS), help="only these faults")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a node for each chain, and no waiting for what takes Slurm long",
    )
    parser.add_argument("--keep", action="store_true", help="keep every chain's folder for a look")
    parser.add_argument("--table", help="write the table into this file, between its markers")
    args = parser.parse_args()
    try:
        results = campaign(
            args.seed,
            args.num,
            args.jobs,
            lambda text: print(text, flush=True),
            args.quick,
            tuple(args.kinds.split(",")),
            args.keep,
        )
    except KeyboardInterrupt:
        print("interrupted; the sandbox has ended", flush=True)
        os._exit(130)  # chains that still watch a Slurm that is gone
    quick = " --quick" if args.quick else ""
    text = table(results, f"tools/faults --seed {args.seed} --num {args.num}{quick}")
    print(text)
    if args.table:
        path = Path(args.table)
        before, _, rest = path.read_text().partition("<!-- table -->\n")
        path.write_text(
            before
            + "<!-- table -->\n"
            + text
            + "\n<!-- end -->\n"
            + rest.partition("<!-- end -->\n")[2]
        )
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
