"""The built-in trainer against a bare torch loop and the Hugging Face Trainer: same model, rows and
batch."""

# extras: train

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Dense bf16 peak of one device in TFLOP/s, from the vendors' data sheets; for MFU.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "MI250": 191.5, "MI300": 1307.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="measured steps per round")
    parser.add_argument(
        "--rounds", type=int, default=5, help="interleaved rounds; of each step the fastest counts"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default=None,
        help="default: bf16 on a GPU, else fp32",
    )
    parser.add_argument(
        "--zero", type=int, default=None, help="ZeRO stage (default: 1 with bf16, else 0)"
    )
    parser.add_argument(
        "--reply-share", type=float, default=0.5, help="share of the tokens that is trained"
    )
    parser.add_argument("--out", default=".bench/train.json")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled")
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)
    precision = args.precision or ("bf16" if gpu else "fp32")
    stage = args.zero if args.zero is not None else (1 if precision == "bf16" else 0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args, precision, stage)
        contenders: dict[str, Callable[[], list[float]]] = {
            "hpctrain": bench.hpctrain,
            "bare torch": bench.bare,
            "bare torch, logits of trained tokens only": bench.bare_selected,
        }
        try:
            import accelerate  # noqa: F401

            contenders["Hugging Face Trainer"] = bench.hf_trainer
        except ImportError:
            print(
                "note: accelerate is not installed, so the Hugging Face Trainer is not measured",
                file=sys.stderr,
            )
        times: dict[str, list[list[float]]] = {name: [] for name in contenders}
        for number in range(args.rounds):
            for name in contenders if number % 2 else reversed(list(contenders)):
                times[name].append(contenders[name]())
                print(
                    f"round {number + 1}: {name}: {statistics.mean(times[name][-1]) * 1000:.1f}"
                    " ms/step",
                    file=sys.stderr,
                )
        report(times, bench, args, gpu)
    return 0


class Bench:
    """The model config, the data, and one way to run each contender; each returns the seconds of
    its steps."""

    def __init__(self, folder: Path, args: argparse.Namespace, precision: str, stage: int):
        from hpctrain.config.trainers.sft import SftConfig, resolve_batch
        from hpctrain.train.sft.data import PackedRows

        self.folder, self.args = folder, args
        model = {
            "model_type": "llama",
            "vocab_size": args.vocab,
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 3,
            "num_hidden_layers": args.layers,
            "num_attention_heads": max(1, args.hidden // 64),
            "num_key_value_heads": max(1, args.hidden // 64),
            "max_position_embeddings": args.seq,
        }
        (folder / "model.json").write_text(json.dumps(model))
        write_dialogues(folder / "data", args)
        self.config = SftConfig(
            model=str(folder / "model.json"),
            train_data_paths=(str(folder / "data"),),
            seq_length=args.seq,
            train_iters=args.steps + 3,
            train_micro_batch_size_per_gpu=args.micro,
            loss_mask_pairs=(7, 7),
            loss_mask_alternating_individual=(8,),
            precision=precision,
            zero_stage=stage,
            checkpoint_factor=10**6,
            log_interval=1,
        )
        self.batch = resolve_batch(self.config, 1)
        self.rows = PackedRows(self.config)
        self.num_parameters = 0

    def hpctrain(self) -> list[float]:
        """The trainer's own loop, data reading, guards and logging included; times between its
        steps."""
        from hpctrain.train.core.launch import Launch, StopRequest
        from hpctrain.train.sft import engine, loop

        engine.finish = lambda: None  # the next round needs the process group again
        stamps: list[float] = []

        class Timed(loop.Trainer):
            def begin_step(self, stopping: bool) -> bool:
                stamps.append(clock())
                return super().begin_step(stopping)

            def save(self) -> None:
                pass  # checkpoints are not what is compared

        launch = Launch(0, 0, 1, "scratch", "", str(self.folder / "ck"), "", str(self.folder), 1)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = Timed(self.config, launch, self.batch)
            self.num_parameters = trainer.num_parameters
            trainer.run(StopRequest())
            trainer.stepper.engine.destroy()
        return list(np.diff(stamps))[2:]

    def bare(self) -> list[float]:
        """What one writes by hand: ready tensors, the plain model with labels, AdamW, clipping."""
        import transformers

        model, optimizer, device, dtype = self._plain(transformers.LlamaForCausalLM)

        def step(tensors: dict[str, Any]) -> Any:
            return model(
                input_ids=tensors["input_ids"],
                position_ids=tensors["position_ids"],
                attention_mask=tensors["attention_mask"],
                labels=tensors["all_labels"],
            ).loss

        return self._loop(model, optimizer, step, device, dtype)

    def bare_selected(self) -> list[float]:
        """The same with the trainer's own forward pass, so that only its loop is compared."""
        import transformers

        from hpctrain.train.sft.model import SftForward

        model, optimizer, device, dtype = self._plain(
            type("Selected", (SftForward, transformers.LlamaForCausalLM), {})
        )

        def step(tensors: dict[str, Any]) -> Any:
            inputs = {key: value for key, value in tensors.items() if key != "all_labels"}
            return model(**inputs) / len(tensors["labels"])

        return self._loop(model, optimizer, step, device, dtype)

    def hf_trainer(self) -> list[float]:
        """`transformers.Trainer` on the same packed rows, masks and labels, ready in memory."""
        import torch
        import transformers

        model, _, _, dtype = self._plain(transformers.LlamaForCausalLM)
        model = model.float()
        rows = []
        for tensors in self._tensors(torch.device("cpu"), dtype):
            keys = {
                "input_ids": "input_ids",
                "position_ids": "position_ids",
                "attention_mask": "attention_mask",
                "labels": "all_labels",
            }
            rows += [
                {key: tensors[name][row] for key, name in keys.items()}
                for row in range(self.args.micro)
            ]
        stamps: list[float] = []

        class Stamp(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                stamps.append(clock())

        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder / "hf"),
            per_device_train_batch_size=self.args.micro,
            max_steps=self.args.steps + 3,
            learning_rate=self.config.lr,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            use_cpu=not torch.cuda.is_available(),
            bf16=self.config.precision == "bf16",
            disable_tqdm=True,
            dataloader_num_workers=0,
            weight_decay=0.0,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            transformers.Trainer(
                model=model, args=arguments, train_dataset=rows, callbacks=[Stamp()]
            ).train()
        return list(np.diff(stamps))[2:]

    def _plain(self, model_class: Any) -> tuple[Any, Any, Any, Any]:
        import torch

        from hpctrain.train.sft.model import read_model_config

        config = read_model_config(self.config.model)
        config._attn_implementation = "sdpa"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        model = model_class(config).to(device).train()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        model = model.to(dtype)
        return (
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda"),
            device,
            dtype,
        )

    def _tensors(self, device: Any, dtype: Any) -> list[dict[str, Any]]:
        import torch

        from hpctrain.train.sft.model import to_tensors

        out = []
        for number in range(self.args.steps + 3):
            first = number * self.args.micro
            batch = self.rows.micro_batch(range(first, first + self.args.micro))
            tensors = to_tensors(batch, "sdpa", dtype, device)
            labels = torch.full((self.args.micro * self.args.seq,), -100, dtype=torch.long)
            labels[torch.from_numpy(batch.trained)] = torch.from_numpy(batch.labels)
            # The plain model shifts labels by one itself; the last column of a row is therefore not
            # trained there.
            shifted = torch.full((self.args.micro, self.args.seq), -100, dtype=torch.long)
            shifted[:, 1:] = labels.reshape(self.args.micro, -1)[:, :-1]
            out.append({**tensors, "all_labels": shifted.to(device)})
        return out

    def _loop(
        self,
        model: Any,
        optimizer: Any,
        step: Callable[[dict[str, Any]], Any],
        device: Any,
        dtype: Any,
    ) -> list[float]:
        import torch

        stamps = []
        for tensors in self._tensors(device, dtype):
            stamps.append(clock())
            step(tensors).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return list(np.diff(stamps))[2:]


def report(
    times: dict[str, list[list[float]]], bench: Bench, args: argparse.Namespace, gpu: bool
) -> None:
    """The table to stdout, and everything to --out."""
    import torch

    device = torch.cuda.get_device_name() if gpu else "CPU, 1 thread, CPU seconds"
    tokens = args.micro * args.seq
    # The n-th step of every round is the same batch: its fastest run is the one the machine
    # disturbed least.
    best = {name: statistics.mean(map(min, zip(*rounds))) for name, rounds in times.items()}
    bare = best["bare torch"]
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    print(
        f"{bench.num_parameters:,} parameters, {bench.config.precision}, ZeRO"
        f" {bench.config.zero_stage}, batch {args.micro} x {args.seq}, {device}, torch"
        f" {torch.__version__}"
    )
    print(
        f"{'':44} {'ms/step':>9} {'tokens/s':>10} {'of bare':>8}" + (f" {'MFU':>6}" if peak else "")
    )
    rows = {}
    for name, seconds in best.items():
        # 6 N per token and 12 L h s for attention (PaLM, arXiv 2204.02311, appendix B).
        flops = (
            (6 * bench.num_parameters + 12 * args.layers * args.hidden * args.seq)
            * tokens
            / seconds
        )
        mfu = flops / 1e12 / peak if peak else None
        rows[name] = {
            "ms_per_step": seconds * 1000,
            "tokens_per_s": tokens / seconds,
            "of_bare": bare / seconds,
            "mfu": mfu,
        }
        print(
            f"{name:44} {seconds * 1000:9.1f} {tokens / seconds:10.0f} {100 * bare / seconds:7.1f}%"
            + (f" {100 * mfu:5.1f}%" if mfu else "")
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device,
        "torch": torch.__version__,
        "parameters": bench.num_parameters,
        **vars(args),
    }
    about["config"] = {
        key: value
        for key, value in dataclasses.asdict(bench.config).items()
        if key in ("precision", "zero_stage")
    }
    Path(args.out).write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


def write_dialogues(prefix: Path, args: argparse.Namespace) -> None:
    """Dialogues of random tokens, long-tailed in length, enough for every step of a round."""
    rng = np.random.default_rng(0)
    documents, total = [], 0
    while total < (args.steps + 6) * args.micro * (args.seq + 1) * 1.1:
        length = int(np.clip(rng.lognormal(4.8, 0.7), 12, args.seq - 8))
        reply = max(1, int(length * args.reply_share))
        user = max(1, length - reply)
        tokens = [
            7,
            *rng.integers(10, args.vocab, user),
            7,
            8,
            *rng.integers(10, args.vocab, reply),
            8,
            2,
        ]
        documents.append(np.array(tokens, dtype="<i4"))
        total += len(tokens)
    sizes = np.array([len(document) for document in documents], dtype="<i4")
    np.concatenate(documents).tofile(f"{prefix}.bin")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * 4
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(sizes), len(sizes) + 1)
    index = np.arange(len(sizes) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(
        header + sizes.tobytes() + pointers.astype("<i8").tobytes() + index.tobytes()
    )


def clock() -> float:
    """Seconds: of the wall on a GPU, of this process's CPU without one, since a shared machine's
    wall says little."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
