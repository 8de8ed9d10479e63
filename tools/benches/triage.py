"""Triage measured: precision and recall over the labelled logs, and MB/s beside `grep -E` of one
pattern.

    tools/bench triage [--mb 200] [--json] [--accuracy-only] [--classes] [--folder DIR]

Ratios within one run are what counts: both read the same file, warm, on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
DATA = TOP / "tests" / "data" / "triage"
# written after the rules, from other people's reports: docs/triage.md
HELD_OUT = TOP / "tests" / "data" / "triage-held-out"
OPEN, RECENT, PROBES = (
    TOP / "tests" / "data" / name for name in ("triage-open", "triage-2026", "triage-probes")
)
SETS = (DATA, HELD_OUT, OPEN, RECENT, PROBES)
sys.path.insert(0, str(TOP))

from hpctrain.triage.engine import Engine  # noqa: E402
from hpctrain.triage.judge import Diagnosis, judge  # noqa: E402
from hpctrain.triage.read import read_logs  # noqa: E402
from hpctrain.triage.rules import RED  # noqa: E402


def diagnose(path: Path, label: dict) -> Diagnosis:
    """What triage says of a labelled log; a label's `files` are the files of one start, beside its
    folder's labels."""
    engine = Engine(tasks_per_node=label.get("tasks_per_node"))
    top = path.parents[len(Path(label["files"][0]).parts) - 1] if "files" in label else None
    read_logs(engine, [str(top / name) for name in label["files"]] if top else [str(path)])
    return judge(engine)


def accuracy(verbose: bool, folder: Path = DATA) -> dict:
    """Cause and RED rules of every labelled log against what triage says."""
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    labels = {name: label for name, label in labels.items() if label.get("scored", True)}
    hits, false, missed = Counter(), Counter(), Counter()
    rule_hits, rule_false, rule_missed = Counter(), Counter(), Counter()
    right, healthy, next_step = Counter(), Counter(), Counter()
    for name, label in sorted(labels.items()):
        diagnosis = diagnose(folder / name, label)
        event = diagnosis.cause.event if diagnosis.cause else None
        found, wanted = event.failure if event else None, label["cause"]
        if found == wanted and found:
            hits[found] += 1
        elif found or wanted:
            false.update([found] if found else [])
            missed.update([wanted] if wanted else [])
        red = {verdict.rule for verdict in diagnosis.verdicts if verdict.verdict == RED}
        rule_hits.update(red & set(label["red"]))
        rule_false.update(red - set(label["red"]))
        rule_missed.update(set(label["red"]) - red)
        if label["verdict"] == "GREEN":
            healthy[diagnosis.verdict] += 1
        if label.get("actions"):
            next_step[diagnosis.action in label["actions"]] += 1
        details = {
            "verdict": diagnosis.verdict == label["verdict"],
            "line": not label.get("line") or bool(event and label["line"] in event.text),
            "rank": label.get("rank") is None or bool(event and event.rank == label["rank"]),
            "node": label.get("node") is None or bool(event and event.node == label["node"]),
        }
        right.update(key for key, good in details.items() if good)
        wrong = [key for key, good in details.items() if not good]
        if label.get("actions") and diagnosis.action not in label["actions"]:
            wrong.append(f"action {diagnosis.action}, not {label['actions']}")
        if verbose and (found != wanted or red != set(label["red"]) or wrong):
            print(
                f"  {name}: cause {found} (label {wanted}), red {sorted(red)} (label"
                f" {label['red']}), wrong {wrong}"
            )
            print(f"      verdict {diagnosis.verdict}: {event or diagnosis.summary}")
    return {
        "logs": len(labels),
        "cause": _scores(hits, false, missed),
        "red_rules": _scores(rule_hits, rule_false, rule_missed),
        "right": {
            key: f"{right[key]}/{len(labels)}" for key in ("verdict", "line", "rank", "node")
        },
        "healthy": dict(healthy),
        "next_step_right": f"{next_step[True]}/{sum(next_step.values())}",
        "per_class": {
            name: _scores(
                Counter({name: hits[name]}),
                Counter({name: false[name]}),
                Counter({name: missed[name]}),
            )
            for name in sorted({*hits, *false, *missed})
        },
    }


def _scores(hits: Counter, false: Counter, missed: Counter) -> dict:
    hit, wrong, lost = sum(hits.values()), sum(false.values()), sum(missed.values())
    return {
        "precision": round(hit / (hit + wrong), 3) if hit + wrong else None,
        "recall": round(hit / (hit + lost), 3) if hit + lost else None,
        "hits": hit,
        "false": wrong,
        "missed": lost,
    }


def big_log(path: str, megabytes: int, kind: str) -> None:
    """A log of that size. `job`: 64 ranks talking and a step line in 40; `steps`: nothing but
    GPT-NeoX's step lines, `hf`: the Trainer's behind progress bars, `trl`: TRL's long ones, `any`:
    short ones of one's own; `bars`: nothing but tqdm; `mixed`: Megatron's step lines between
    warnings, NCCL's INFO, bars and tracebacks that are caught.
    """
    rnd = random.Random(5)
    words = (
        "loading module from path tokenizer rank group initialize model parallel data worker"
        " process with size of the layer param shard dtype bfloat16 device set attention config"
        " value default using fused kernel build extension"
    ).split()
    lines = []
    for index in range(20_000):
        step = (
            f" samples/sec: 33.880 | iteration {index:8d}/   20000 | elapsed time per iteration"
            " (ms): 17001.3 | learning rate: 8.000E-06 | approx flops per GPU: 45.1TFLOPS |"
            f" lm_loss: {2.4 - index * 1e-5:.6E} | grad norm: 0.913 | number of skipped iterations:"
            "   0 | number of nan iterations:   0 |"
        )
        if kind == "steps" or (kind == "job" and index % 40 == 0):
            lines.append(step)
        elif kind in ("hf", "trl"):
            bar = f"\r {index % 100}%|█▍        | {index}/20000 [10:02<12:01,  2.02s/it]"
            more = ""
            if kind == "trl":
                more = "".join(
                    f" '{name}': {rnd.uniform(0.1, 9):.6f},"
                    for name in (
                        "entropy",
                        "num_tokens",
                        "rewards/chosen",
                        "rewards/rejected",
                        "rewards/accuracies",
                        "rewards/margins",
                        "logps/chosen",
                        "mean_token_accuracy",
                    )
                )
            lines.append(
                f"{bar}{bar}\n{{'loss': {2.4 - index * 1e-5:.4f}, 'grad_norm':"
                f" {rnd.uniform(0.5, 2):.6f}, 'learning_rate':"
                f" {1e-5 * (1 - index / 20000):.6g},{more} 'epoch': {index / 10000:.2f}}}"
            )
        elif kind == "any":
            lines.append(
                f"step {index} | loss {2.4 - index * 1e-5:.4f} | lr {1e-4:.2e} |"
                f" {rnd.uniform(500, 2000):.2f} ms | {rnd.randint(10000, 99999)} tok/s"
            )
        elif kind == "mixed":
            lines.append(_mixed(index, rnd))
        elif kind == "bars":
            lines.append(
                "".join(
                    f"\r {k}%|█▍        | {index + k}/20000 [10:02<12:01,  2.02s/it]"
                    for k in range(8)
                )
            )
        else:
            stamp = (
                f"[2026-11-21 01:{index // 60 % 60:02d}:{index % 60:02d},123] [INFO]"
                f" [rank{index % 64}]"
            )
            lines.append(f"{stamp} " + " ".join(rnd.choices(words, k=12)))
    block = ("\n".join(lines) + "\n").encode()
    with open(path, "wb") as file:
        while file.tell() < megabytes * 1_000_000:
            file.write(block)


def _mixed(index: int, rnd: random.Random) -> str:
    chance = rnd.random()
    if chance < 0.25:
        return (
            f" [2026-05-09 06:23:{index % 60:02d}.000000] iteration {index:8d}/ 900000 | consumed"
            f" samples: {index * 256:12d} | elapsed time per iteration (ms):"
            f" {6012.3 + rnd.random():.1f} | learning rate: 3.000000E-04 | global batch size:   256"
            f" | lm loss: {2.4 + rnd.random() * 0.01:.6E} | loss scale: 1.0 | grad norm:"
            f" {0.5 + rnd.random() * 0.1:.3f} | number of skipped iterations:   0 | number of nan"
            " iterations:   0 |"
        )
    if chance < 0.5:
        return (
            f"[rank{index % 8}]:[W509 06:23:{index % 60:02d}.123 socket.cpp:759] [c10d] The client"
            f" socket cannot be initialized to connect to [gpu-{index % 9}]:29500 (errno: 97 -"
            " Address family not supported by protocol)."
        )
    if chance < 0.8:
        return (
            f"gpu-{index % 9}:811:{900 + index % 9} [{index % 8}] NCCL INFO Channel"
            f" {index % 24:02d}/1 : 0[0] -> {index % 8}[{index % 8}] [send] via NET/IB/GDRDMA"
        )
    if chance < 0.97:
        return "\r".join(
            f" {k}%|█▍  | {index + k}/200000 [10:02<12:01, 2.02s/it]" for k in range(3)
        )
    return (
        'Traceback (most recent call last):\n  File "/w/reward.py", line 41, in compute\n    ans ='
        f" parse(solution)\nValueError: could not convert string to float: '{index}'"
    )


def speed(megabytes: int) -> dict:
    out = {}
    for kind in ("job", "bars", "steps", "hf", "trl", "any", "mixed"):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "big.log")
            big_log(path, megabytes, kind)
            size = os.path.getsize(path) / 1e6
            ours = min(_ours(path) for _ in range(3))
            grep = min(
                _child_s(["grep", "-c", "-E", "CUDA out of memory|lm_loss: [nN][aA][nN]", path])
                for _ in range(3)
            )
            python = min(_python(path) for _ in range(2))
            out[kind] = {
                "MB": round(size),
                "triage_MB_per_cpu_s": round(size / ours),
                "grep_E_MB_per_cpu_s": round(size / grep),
                "python_re_MB_per_cpu_s": round(size / python),
                "triage_over_grep": round(grep / ours, 3),
                "triage_over_python_re": round(python / ours, 1),
            }
    out["peak_rss_MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return out


def _ours(path: str) -> float:
    start = time.process_time()
    engine = Engine()
    read_logs(engine, [path])
    judge(engine)
    return time.process_time() - start


def _python(path: str) -> float:
    """What a script of one's own does: a regex of the fatal patterns on every line."""
    import re

    pattern = re.compile(
        rb"CUDA out of memory|HIP out of memory|NCCL WARN|oom_kill|lm_loss: nan|DUE TO TIME"
        rb" LIMIT|Error"
    )
    start = time.process_time()
    with open(path, "rb") as file:
        sum(1 for line in file if pattern.search(line))
    return time.process_time() - start


def _child_s(argv: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime or 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--accuracy-only", action="store_true")
    parser.add_argument("--classes", action="store_true", help="each failure class's figures too")
    parser.add_argument(
        "--folder", type=Path, action="append", help="a labelled set of one's own, instead"
    )
    options = parser.parse_args()
    folders = options.folder or SETS
    result = {folder.name: accuracy(not options.json, folder) for folder in folders}
    if not options.classes:
        for scores in result.values():
            del scores["per_class"]
    if not options.accuracy_only:
        result["speed"] = speed(options.mb)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
