"""Links of hf-sft runs, each in a forked process of its own, so that torch and TRL are imported
only once.

    python scenarios.py ORDERS.json

An order is `[what, arguments]`: `train` (an environment, and perhaps a signal after some log
lines), `export`, `validate`, `command` (of hpctrain), `trl_rows`. Writes ORDERS.json.out: for each
`{"code": …, "said": …, "problems": […], "answer": …}`.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

warnings.filterwarnings("ignore")
import datasets  # noqa: E402
import peft  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from hpctrain.base import errors  # noqa: E402
from hpctrain.config.trainers.trl import load_config  # noqa: E402
from hpctrain.train.core.launch import Launch, StopRequest  # noqa: E402
from hpctrain.train.core.program import newest_complete  # noqa: E402
from hpctrain.train.core.source import find_checkpoint  # noqa: E402
from hpctrain.train.trl import export, rows, validate  # noqa: E402
from hpctrain.train.trl.__main__ import start  # noqa: E402


def train(environment: dict[str, str], **_: Any) -> int:
    if environment["HPCTRAIN_CHECKPOINT"].endswith("NEWEST"):
        newest = newest_complete("hf-trainer", environment["HPCTRAIN_CHECKPOINT_DIR"])
        environment = {**environment, "HPCTRAIN_CHECKPOINT": newest or "none"}
    os.environ.update(environment)
    stop = StopRequest()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        stop.listen(number)
    return start(
        load_config(environment["HPCTRAIN_CONFIG"]), Launch.from_environment(os.environ), stop
    )


def export_(source: str, directory: str, **options: Any) -> dict[str, Any]:
    checkpoint = find_checkpoint(source)
    assert checkpoint
    if options.pop("corrupt", False):
        # What a merge through other precision does: the weights on disk are not those that were
        # computed.
        real = transformers.PreTrainedModel.save_pretrained

        def save(self: Any, *arguments: Any, **more: Any) -> Any:
            with torch.no_grad():
                self.model.layers[0].mlp.down_proj.weight.mul_(1.5)
            return real(self, *arguments, **more)

        transformers.PreTrainedModel.save_pretrained = save
    names, proof = export.export_checkpoint(checkpoint, directory, **options)
    return {"names": names, **vars(proof)}


def validate_(model: str, test_set: str, **options: Any) -> dict[str, Any]:
    found = validate.validate(model, test_set, **options)
    return {
        **vars(found),
        "replies": [vars(reply) for reply in found.replies],
        "faults": found.faults,
        "said": validate.describe(found),
    }


def command(argv: list[str]) -> int:
    from hpctrain import cli

    try:
        cli.main(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def trl_rows(base: str, cases: list[dict[str, Any]]) -> list[Any]:
    """For each case TRL's own tokens and labels, and ours."""
    answers = []
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for case in cases:
        arguments = trl.SFTConfig(
            output_dir=f"{base}/../never",
            use_cpu=True,
            report_to=[],
            max_length=case["max_length"],
            assistant_only_loss=case.get("assistant_only", False),
            completion_only_loss=case.get("completion_only"),
        )
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=datasets.Dataset.from_list(case["rows"]),
            processing_class=tokenizer,
        )
        theirs = [[row["input_ids"], row["labels"]] for row in trainer.train_dataset]
        encoder = rows.Encoder(
            tokenizer,
            case["max_length"],
            case.get("completion_only"),
            case.get("assistant_only", False),
            None,
        )
        answers.append(
            [theirs, [list(found) for found in map(encoder.encode, case["rows"]) if found]]
        )
    return answers


def run(what: str, arguments: dict[str, Any], path: str) -> None:
    """In the child: one order, its answer to `path`."""
    answer: dict[str, Any] = {"code": 70, "problems": [], "answer": None}
    try:
        found = {
            "train": train,
            "export": export_,
            "trl_rows": trl_rows,
            "validate": validate_,
            "command": command,
        }[what](**arguments)
        answer.update(code=found if what in ("train", "command") else 0, answer=found)
    except errors.HpctrainError as error:
        answer.update(code=error.exit_code, problems=[str(problem) for problem in error.problems])
    except BaseException:
        traceback.print_exc()
    with open(path, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    atexit._run_exitfuncs()  # as a process of its own would
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def lines(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return file.read().count(b"\n")
    except OSError:
        return 0


def main() -> None:
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        orders = json.load(file)
    answers = []
    for number, (what, arguments) in enumerate(orders):
        path = f"{sys.argv[1]}.{number}"
        log = os.path.join(
            arguments.get("environment", {}).get("HPCTRAIN_RUN_DIR", ""), "metrics.jsonl"
        )
        before = lines(log)
        child = os.fork()
        if child == 0:
            output = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run(what, arguments, path)
        if "signal" in arguments:
            name, after = arguments["signal"]
            while (
                lines(log) < before + after
                and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.005)
            os.kill(child, getattr(signal, f"SIG{name}"))
        os.waitpid(child, 0)
        answer = {"code": -9, "problems": [], "answer": None}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                answer = json.load(file)
        with open(f"{path}.log", encoding="utf-8", errors="replace") as file:
            answers.append({**answer, "said": file.read()})
    with open(f"{sys.argv[1]}.out", "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
