"""Tokenizer benchmark: ratios against GPT-NeoX's per-document loop and a bare sp.encode(list),
interleaved in one run.

  tools/bench tokenize [--corpus sft.jsonl] [--mb 130] [--rounds 3] [--big-mb 3000] [--only ratios,two] [--neox COMMAND] [--json]

Everything is a process of its own; times are CPU-seconds (user + system) of that process and its
children, start-up included, except for the bare encode, which times nothing but the call. Results
are compared byte by byte with the reference's. Without --corpus, shared/tools/build_corpus.py
builds one from Debian packages (apt-get download, no root).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
CONTROL = ["<|r3|>", "<|r4|>", "<|r5|>", "<|r6|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
MODELS = {
    "bpe32k_identity": dict(
        model_type="bpe",
        vocab_size=32000,
        normalization_rule_name="identity",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    ),
    "bpe100k_nmt_nfkc": dict(
        model_type="bpe", vocab_size=100_000, normalization_rule_name="nmt_nfkc", byte_fallback=True
    ),
    "bpe32k_no_fallback": dict(
        model_type="bpe", vocab_size=32000, normalization_rule_name="nmt_nfkc", byte_fallback=False
    ),
    "unigram32k_nmt_nfkc": dict(
        model_type="unigram",
        vocab_size=32000,
        normalization_rule_name="nmt_nfkc",
        byte_fallback=True,
    ),
}
# Out of mistral-common, which tools/env installs. They have no control pieces but these for our
# markers.
REAL = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
}
REAL_WORDS = (
    "--eod",
    "</s>",
    "--control-token",
    "<<<|user|>>>=<s>",
    "--control-token",
    "<<<|assistant|>>>=</s>",
)


def reference(path: str, model: str, prefix: str) -> None:
    """GPT-NeoX preprocess_sft.py --append-eod --workers 1, its work per document and nothing else.

    Faster than the original, which also passes each document through lm_dataformat, jsonlines, two
    semaphores and tqdm.
    """
    import re

    import numpy as np
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    real = sp.is_unknown(sp.piece_to_id("<|endoftext|>"))
    eod = sp.piece_to_id("</s>" if real else "<|endoftext|>")
    special = ["<<<|user|>>>", "<<<|assistant|>>>"]
    vocab = dict(zip(special, [sp.piece_to_id("<s>"), eod] if real else [7, 8]))
    pattern = f"({'|'.join(re.escape(token) for token in special)})"
    dtype = np.uint16 if sp.get_piece_size() < 65500 else np.int32
    sizes, doc_idx = [], [0]
    with open(path, encoding="utf-8") as lines, open(prefix + ".bin", "wb") as out:
        for line in lines:
            text = json.loads(line)["text"]
            if not text:
                continue
            parts = [part for part in re.split(pattern, text) if part.strip()]
            if len(parts) <= 1:
                raise ValueError(text)
            ids = []
            for part in parts:
                if part in special:
                    ids += [vocab[part]]
                else:
                    ids += sp.encode(part)
            ids.append(eod)
            array = np.array(ids, dtype=dtype)
            out.write(array.tobytes(order="C"))
            sizes.append(array.size)
            doc_idx.append(len(sizes))
    import struct

    with open(prefix + ".idx", "wb") as out:
        pointers = np.zeros(len(sizes), dtype=np.int64)
        lengths = np.array(sizes, dtype=np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:])
        out.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 8 if dtype is np.uint16 else 4))
        out.write(
            struct.pack("<QQ", len(sizes), len(doc_idx)) + np.array(sizes, dtype=np.int32).tobytes()
        )
        out.write(
            (pointers * dtype().itemsize).tobytes() + np.array(doc_idx, dtype=np.int64).tobytes()
        )


def bare(path: str, model: str) -> None:
    """CPU-seconds of sp.encode(all spans as one list, num_threads=1); no reading, splitting or
    writing is counted."""
    import re

    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    pattern = re.compile(r"<<<\|user\|>>>|<<<\|assistant\|>>>")
    spans = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            spans += [part for part in pattern.split(json.loads(line)["text"]) if part.strip()]
    cpu = time.process_time()
    sp.encode(spans, out_type=int, num_threads=1)
    print(time.process_time() - cpu)


def run(argv: list[str]) -> tuple[float, float, float, str]:
    """(CPU s with children, wall s, peak MiB of the largest process, stdout) of a process that must
    succeed."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(argv)}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024, text


def tokenize(path: Path, model: Path, prefix: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "hpctrain",
        "tokenize",
        str(path),
        "--tokenizer",
        str(model),
        "--output-prefix",
        str(prefix),
        "--local",
        "--force",
        *more,
    ]


def child(*args: object) -> list[str]:
    return [sys.executable, __file__, "--child", *map(str, args)]


def digest(prefix: Path) -> str:
    sums = [
        hashlib.sha256(prefix.with_name(prefix.name + end).read_bytes()).hexdigest()[:16]
        for end in (".bin", ".idx")
    ]
    return " ".join(sums)


def corpus(given: str | None, megabytes: float, work: Path) -> Path:
    if given:
        whole = Path(given)
    else:
        whole = work / "sft.jsonl"
        builder = next(
            (
                p
                for p in (
                    TOP / "shared/tools/build_corpus.py",
                    TOP.parent / "shared/tools/build_corpus.py",
                    TOP.parent.parent / "shared/tools/build_corpus.py",
                )
                if p.is_file()
            ),
            None,
        )
        if not builder:
            raise SystemExit("no shared/tools/build_corpus.py here: give --corpus FILE.jsonl")
        if not whole.exists():
            subprocess.run(
                [
                    sys.executable,
                    str(builder),
                    "--work",
                    str(work),
                    "--out",
                    str(whole),
                    "--target-mb",
                    str(megabytes),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
    part = work / f"first-{megabytes:g}.jsonl"
    if not part.exists():
        with whole.open("rb") as source, part.open("wb") as out:
            size = 0
            for line in source:
                size += len(line)
                if size > megabytes * 1e6:
                    break
                out.write(line)
    return part


def train(data: Path, work: Path, names: list[str]) -> dict[str, Path]:
    """Models trained on lines from the corpus itself, so that they fit it as a real tokenizer fits
    its language."""
    sample = work / "train.txt"
    if not sample.exists():
        rng, lines = random.Random(3), []
        with data.open() as source:
            for line in source:
                text = (
                    json.loads(line)["text"]
                    .replace("<<<|user|>>>", "\n")
                    .replace("<<<|assistant|>>>", "\n")
                )
                lines += [one for one in text.split("\n") if one.strip() and len(one) < 3000]
        rng.shuffle(lines)
        sample.write_text("\n".join(lines[:120_000]))
    found = {}
    for name in names:
        found[name] = shipped(name) if name in REAL else work / f"{name}.model"
        if not found[name].exists():
            print(f"training {name} …", file=sys.stderr)
            # A process of its own, as a child's peak memory (ru_maxrss) begins with that of the
            # parent it was forked from.
            subprocess.run(child("train", sample, work / name, name), check=True)
    return found


def shipped(name: str) -> Path:
    """A model that came with a package."""
    files = importlib.metadata.files("mistral-common") or []
    return next(Path(file.locate()) for file in files if file.name == REAL[name])


def train_one(sample: str, prefix: str, name: str) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=sample,
        model_prefix=prefix,
        control_symbols=CONTROL,
        minloglevel=2,
        num_threads=2,
        max_sentence_length=8192,
        character_coverage=0.9995,
        **MODELS[name],
    )


def enlarge(data: Path, megabytes: float, work: Path) -> Path:
    """A file of that size with new words in each copy, so that a cache of words cannot live off
    repetition."""
    target = work / f"big-{megabytes:g}.jsonl"
    if target.exists():
        return target
    letters = "abcdefghijklmnopqrstuvwxyzабвгдежзиклмнопрстуфхцч"
    size, number = 0, 0
    with target.open("w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            table = str.maketrans(
                letters, letters[number % len(letters) :] + letters[: number % len(letters)]
            )
            with data.open(encoding="utf-8") as source:
                for index, line in enumerate(source):
                    if index % 5 == 0 and number:
                        parts = json.loads(line)["text"].split("<<<|")
                        turned = [part.split("|>>>") for part in parts]
                        text = "<<<|".join(
                            "|>>>".join([*one[:-1], one[-1].translate(table)]) for one in turned
                        )
                        line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                    out.write(line)
                    size += len(line.encode())
                    if size >= megabytes * 1e6:
                        break
            number += 1
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus")
    parser.add_argument("--mb", type=float, default=130)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--big-mb",
        type=float,
        default=0,
        help="also measure memory on this much (3000 for the full claim)",
    )
    parser.add_argument("--work", help="where data and models are kept between runs")
    parser.add_argument("--models", default=",".join([*MODELS, *REAL]))
    parser.add_argument(
        "--only", default="ratios,two,merge,memory", help="which parts [default: all: %(default)s]"
    )
    parser.add_argument(
        "--neox",
        help="shell command of GPT-NeoX's own preprocess_sft.py, to measure the original as well",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = Path(args.work or Path(tempfile.gettempdir()) / f"hpctrain-bench-{os.getuid()}")
    work.mkdir(parents=True, exist_ok=True)
    data = corpus(args.corpus, args.mb, work)
    models = train(data, work, args.models.split(","))
    out = Path(tempfile.mkdtemp(prefix="out-", dir=work))
    results: dict[str, object] = {
        "megabytes": round(data.stat().st_size / 1e6, 1),
        "rounds": args.rounds,
    }
    say = lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)  # noqa: E731
    say(
        f"{data}: {data.stat().st_size / 1e6:.1f} MB; load {os.getloadavg()[0]:.1f} on"
        f" {os.cpu_count()} cores"
    )
    try:
        first = next(iter(models.values()))
        parts = args.only.split(",")
        if "ratios" in parts:
            say(
                "CPU-seconds, median of the rounds     reference  bare encode  hpctrain  x"
                " reference  x bare   bytes"
            )
            results["models"] = {
                name: ratios(data, model, out, args.rounds, name, say, args.neox)
                for name, model in models.items()
            }
        if "two" in parts:
            results["two_tasks"] = two_tasks(data, first, out, args.rounds, say)
        if "merge" in parts:
            results["merge"] = merge_and_cat(data, first, out, args.rounds, say)
        if "memory" in parts:
            sizes = [30.0, args.mb, *([args.big_mb] if args.big_mb else [])]
            results["peak_mib"] = memory(data, first, out, work, sizes, say)
    finally:
        shutil.rmtree(out)
    if args.json:
        print(json.dumps(results, indent=1))


def original(command: str, data: Path, model: Path, prefix: Path) -> list[str]:
    """The unmodified script, one worker; it appends `_text_document` to the prefix."""
    more = [
        "--input",
        data,
        "--tokenizer-type",
        "SPMTokenizer",
        "--vocab-file",
        model,
        "--append-eod",
        "--workers",
        1,
        "--output-prefix",
        prefix,
    ]
    return ["sh", "-c", f"{command} {shlex.join(map(str, more))}"]


def ratios(
    data: Path, model: Path, out: Path, rounds: int, name: str, say, neox: str | None = None
) -> dict[str, object]:
    times: dict[str, list[float]] = {"reference": [], "bare": [], "hpctrain": []}
    originals: list[float] = []
    for _ in range(rounds):
        if neox:
            originals.append(run(original(neox, data, model, out / "neox"))[0])
        times["reference"].append(run(child("reference", data, model, out / "ref"))[0])
        times["bare"].append(float(run(child("bare", data, model))[3]))
        words = REAL_WORDS if name in REAL else ()
        times["hpctrain"].append(run(tokenize(data, model, out / name, *words))[0])
        for path in (out / f"{name}.tokenize").iterdir():
            path.unlink()
        same = digest(out / "ref") == digest(out / f"{name}_text_document")
        same = same and (not neox or digest(out / "neox_text_document") == digest(out / "ref"))
        (out / f"{name}_text_document.idx").unlink()
    a, b, c = (statistics.median(values) for values in times.values())
    say(
        f"{name:36} {a:10.2f} {b:12.2f} {c:9.2f} {a / c:12.2f} {b / c:7.2f}  "
        f" {'same' if same else 'DIFFERENT'}"
    )
    if neox:
        original_s = statistics.median(originals)
        say(f"  preprocess_sft.py itself: {original_s:.2f}, x{original_s / c:.2f}")
        times["original"] = originals
    return {
        "reference_cpu_s": a,
        "bare_cpu_s": b,
        "hpctrain_cpu_s": c,
        "x_reference": a / c,
        "x_bare": b / c,
        "same": same,
        "all": times,
    }


def two_tasks(data: Path, model: Path, out: Path, rounds: int, say) -> dict[str, float]:
    """Each process warms its own cache and loads its own model, so this is on four times the
    data."""
    big = out / "four.jsonl"
    with big.open("wb") as target:
        for _ in range(4):
            with data.open("rb") as source:
                shutil.copyfileobj(source, target, 8 << 20)
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count in (1, 2):
            prefix = out / f"two{count}"
            walls[count].append(
                run(tokenize(big, model, prefix, "--tasks", "2", "--processes", str(count)))[1]
            )
            for path in out.glob(f"two{count}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    big.unlink()
    one, two = (statistics.median(walls[count]) for count in (1, 2))
    say(
        f"two local processes: {one:.1f} s -> {two:.1f} s wall, x{one / two:.2f} (load"
        f" {os.getloadavg()[0]:.1f})"
    )
    return {"one_wall_s": one, "two_wall_s": two, "x": one / two, "load": os.getloadavg()[0]}


def merge_and_cat(data: Path, model: Path, out: Path, rounds: int, say) -> dict[str, float]:
    """The merge makes the .idx and flushes both files to the disk; cat gets the same .bin shards
    and the same flush."""
    run(tokenize(data, model, out / "m", "--tasks", "8", "--processes", "2", "--keep-shards"))
    shards = sorted((out / "m.tokenize").glob("*.bin"))
    merges, cats = [], []
    for _ in range(rounds + 2):
        started = time.monotonic()
        subprocess.run(
            [
                "sh",
                "-c",
                'o=$1; shift; cat "$@" > "$o"; sync "$o"',
                "sh",
                str(out / "cat.bin"),
                *map(str, shards),
            ],
            check=True,
        )
        cats.append(time.monotonic() - started)
        (out / "cat.bin").unlink()
        program = (
            "import sys,time\nfrom hpctrain.data.merge import merge_shards\nfrom"
            " hpctrain.data.tasks import load_plan\nimport numpy\np = load_plan(sys.argv[1])\nt ="
            " time.monotonic()\nmerge_shards(p)\nprint(time.monotonic() - t)"
        )
        for path in out.glob("m_text_document*"):
            path.unlink()
        plan = next((out / "m.tokenize").glob("*.plan.json"))
        merges.append(float(run([sys.executable, "-c", program, str(plan)])[3]))
    cat, merge = statistics.median(cats), statistics.median(merges)
    size = sum(shard.stat().st_size for shard in shards)
    say(f"merge of {size / 1e6:.0f} MB: cat {cat:.3f} s, merge {merge:.3f} s, x{cat / merge:.2f}")
    return {"megabytes": size / 1e6, "cat_s": cat, "merge_s": merge, "x": cat / merge}


def memory(
    data: Path, model: Path, out: Path, work: Path, sizes: list[float], say
) -> dict[str, float]:
    peaks = {}
    for megabytes in sizes:
        path = (
            enlarge(data, megabytes, work)
            if megabytes > data.stat().st_size / 1e6 + 1
            else corpus(str(data), megabytes, work)
        )
        cpu, wall, peak, _ = run(tokenize(path, model, out / "mem"))
        say(
            f"{path.stat().st_size / 1e6:6.0f} MB: peak {peak:.0f} MiB,"
            f" {path.stat().st_size / 1e6 / cpu:.1f} MB per CPU-second, {wall:.0f} s"
        )
        peaks[f"{megabytes:g}"] = peak
        for leftover in out.glob("mem*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return peaks


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        {"reference": reference, "bare": bare, "train": train_one}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
