"""The built-in DPO trainer against TRL's DPOTrainer: same model, pairs and batch, interleaved,
speed and memory."""

# extras: train,bench

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
# As tools/bench starts this file: without its folder, whose tokenize.py is not Python's, on the
# path.
START = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
CONTENDERS = ("hpctrain", "hpctrain, share_prompt never", "TRL", "TRL, reference precomputed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="interleaved rounds")
    parser.add_argument(
        "--steps", type=int, default=8, help="optimizer steps per round; all rounds are one epoch"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=64, help="median tokens of a prompt")
    parser.add_argument("--reply", type=int, default=96, help="median tokens of a reply")
    parser.add_argument("--max-len", type=int, default=384)
    parser.add_argument("--out", default=".bench/dpo.json")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.contender:
        return Worker(args).run()
    try:
        import trl
    except ImportError:
        print("this needs TRL: pip install trl==1.16.0 accelerate datasets", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), args)
        results = race(args, folder)
    ours = results[0]
    print(
        f"\n{'':32} {'tokens/s':>9} {'CPU tokens/s':>13} {'peak MiB':>9} {'of it model':>12}  "
        " hpctrain is"
    )
    for result in results:
        ratio, cpu = (ours[key] / result[key] for key in ("tokens_per_s", "tokens_per_cpu_s"))
        result.update(
            speed_ratio=ratio, cpu_ratio=cpu, memory_ratio=ours["model_mib"] / result["model_mib"]
        )
        print(
            f"{result['name']:32} {result['tokens_per_s']:9.0f} {result['tokens_per_cpu_s']:13.0f}"
            f" {result['peak_mib']:9.0f} {result['model_mib']:12.0f}   {ratio:.2f}x as fast"
            f" ({cpu:.2f}x by CPU time), {result['memory_ratio']:.2f}x the memory"
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        key: value for key, value in vars(args).items() if key not in ("contender", "folder", "out")
    }
    out.write_text(
        json.dumps({"settings": settings, "trl": trl.__version__, "results": results}, indent=1)
        + "\n"
    )
    print(f"wrote {out}")
    return 0


def race(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """All contenders as processes of their own, taking turns; one of them runs at a time."""
    processes = {}
    for name in CONTENDERS:
        command = [
            sys.executable,
            "-c",
            START,
            __file__,
            *sys.argv[1:],
            "--contender",
            name,
            "--folder",
            folder,
        ]
        log = open(os.path.join(folder, f"{name}.log"), "w")
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        answer(processes[name], log.name)  # ready
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        for at in range(len(CONTENDERS)):
            name = CONTENDERS[(number + at) % len(CONTENDERS)]
            process = processes[name]
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
            found = answer(process, os.path.join(folder, f"{name}.log"))
            rounds[name].append(found)
            print(
                f"round {number + 1} {name:30} {found['seconds']:7.2f} s, {found['tokens']} tokens",
                file=sys.stderr,
            )
    results = []
    for name in CONTENDERS:
        processes[name].kill()
        processes[name].wait()
        results.append(
            {
                "name": name,
                # All rounds together are one epoch, so everyone trained the same pairs, each in an
                # order of its own.
                "tokens_per_s": (
                    sum(found["tokens"] for found in rounds[name])
                    / sum(found["seconds"] for found in rounds[name])
                ),
                "tokens_per_cpu_s": (
                    sum(found["tokens"] for found in rounds[name])
                    / sum(found["cpu_s"] for found in rounds[name])
                ),
                "rounds": rounds[name],
                "peak_mib": rounds[name][-1]["peak_mib"],
                "model_mib": rounds[name][-1]["peak_mib"] - rounds[name][-1]["imports_mib"],
            }
        )
    return results


def answer(process: subprocess.Popen[str], log: str) -> dict[str, Any]:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("ANSWER "):
            return dict(json.loads(line[7:]))
    raise SystemExit(f"a contender died with {process.wait()}:\n{Path(log).read_text()[-3000:]}")


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """A Llama directory and pairs of text whose lengths are spread as those of real preference data
    (log-normal)."""
    sys.path.insert(0, str(TOP / "tests" / "promises" / "dpo"))
    import numpy as np
    import tiny

    heads = max(1, args.hidden // 64)
    tiny.write_model(
        folder / "policy",
        scale=0.02,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 2.75),
        vocab_size=args.vocab,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=args.hidden // heads,
        max_position_embeddings=2 * args.max_len,
    )
    rng = np.random.RandomState(0)
    letters = "bdfghjklmnpqrstvwxyz"

    def text(median: int) -> str:  # about one token a letter: the tiny tokenizer knows few words
        return "".join(
            letters[n]
            for n in rng.randint(
                0, len(letters), max(2, int(median * np.exp(0.6 * rng.standard_normal())))
            )
        )

    rows = [
        {
            "prompt": text(args.prompt) + ":",
            "chosen": " " + text(args.reply),
            "rejected": " " + text(args.reply),
        }
        for _ in range(args.rounds * args.steps * args.batch)
    ]
    tiny.write_rows(folder / "pairs.jsonl", rows)


class Worker:
    """One contender in a process of its own: trains `steps` steps at each `go`, then says how long
    they took."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.folder)
        self.tokens, self.done, self.imports_mib = 0, 0, 0.0

    def run(self) -> int:
        name = self.args.contender
        if name.startswith("TRL"):
            self.trl("precomputed" in name)
        else:
            self.hpctrain("never" if "never" in name else "auto")
        return 0

    def imported(self) -> None:
        """All packages are in memory, no model yet."""
        import torch

        torch.set_num_threads(1)
        self.imports_mib = peak_mib()

    def turn(self) -> None:
        """Called before each step: at the end of a round says what it took, and waits for the next
        `go`."""
        if self.done % self.args.steps == 0:
            found = {}
            if self.done:
                found = {
                    "seconds": time.perf_counter() - self.since,
                    "cpu_s": time.process_time() - self.cpu_since,
                    "tokens": self.tokens,
                    "peak_mib": peak_mib(),
                    "imports_mib": self.imports_mib,
                }
            self.tokens = 0
            print("ANSWER " + json.dumps(found), flush=True)
            if sys.stdin.readline() != "go\n":
                os._exit(0)
            self.since, self.cpu_since = time.perf_counter(), time.process_time()
        self.done += 1

    def hpctrain(self, share: str) -> None:
        from hpctrain.config.trainers.dpo import load_config
        from hpctrain.train.core.launch import Launch, StopRequest
        from hpctrain.train.dpo.loop import DpoTrainer

        self.imported()
        folder = self.folder / f"hpctrain-{share}"
        config = {
            "policy_name": str(self.folder / "policy"),
            "precision": "fp32",
            "dataset": {
                "dataset_name": str(self.folder / "pairs.jsonl"),
                "max_len": self.args.max_len,
            },
            "dpo_training": {
                "batch_size": self.args.batch,
                "learning_rate": 1e-5,
                "share_prompt": share,
                "log_steps": 4,
                "max_steps": self.args.rounds * self.args.steps + 1,
                "save_steps": 10**6,
            },
        }
        folder.mkdir()
        (folder / "config_dpo.yaml").write_text(json.dumps(config))
        launch = Launch(
            0, 0, 1, "scratch", str(folder / "config_dpo.yaml"), str(folder), "", str(folder), 0
        )
        trainer = DpoTrainer(load_config(launch.config), launch)
        step = trainer.step

        def counted(number: int) -> bool:
            self.turn()
            epoch, at = divmod(number - 1, trainer.per_epoch)
            pairs = [trainer.pairs[pair] for pair in trainer._epoch(epoch)[at]]
            self.tokens += sum(pair.num_tokens + len(pair.prompt) for pair in pairs)
            return step(number)

        trainer.step = counted  # type: ignore[method-assign]
        trainer.run(StopRequest())

    def trl(self, precomputed: bool) -> None:
        import datasets
        import torch
        import transformers
        import trl

        worker = self
        self.imported()

        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                worker.turn()

        class Counting(trl.DPOTrainer):
            def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
                worker.tokens += int(inputs["attention_mask"].sum())
                return super().compute_loss(model, inputs, *rest, **more)

        settings = trl.DPOConfig(
            output_dir=str(self.folder / self.args.contender),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            max_length=self.args.max_len,
            report_to="none",
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=self.args.batch,
            save_strategy="no",
            logging_steps=4,
            max_steps=self.args.rounds * self.args.steps + 1,
            seed=0,
            disable_tqdm=True,
            precompute_ref_log_probs=precomputed,
        )
        policy = str(self.folder / "policy")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            policy, dtype="float32", attention_dropout=0.0
        )
        rows = datasets.load_dataset(
            "json",
            data_files=str(self.folder / "pairs.jsonl"),
            split="train",
            cache_dir=str(self.folder / self.args.contender / "cache"),
        )
        trainer = Counting(
            model=model,
            args=settings,
            train_dataset=rows,
            callbacks=[Turns()],
            processing_class=transformers.AutoTokenizer.from_pretrained(policy),
        )
        trainer.train()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
