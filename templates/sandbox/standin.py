"""Stands in for the training program of rank 0 in a rehearsal: walks through the iterations in
compressed time and saves in the recipe's layout. Standard library only.

    standin.py DIR

It runs where the real program would, inside the container, as a script. DIR holds `scenario.json`
(what to do), the pipes `records` (what happened, read by hpctrain) and `hold` (open as long as rank
0 lives; the other ranks wait for its end).
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

# A comment for shell, Python and YAML alike: such files are sourced and read.
CONTENT = b"# a placeholder written by hpctrain rehearse: there is nothing in it\n"
# A safetensors file begins with the length of its header.
MODEL = {
    "config.json": b"{}\n",
    "tokenizer_config.json": b"{}\n",
    "tokenizer.json": b"{}\n",
    "model.safetensors": b"\x02" + bytes(7) + b"{}",
}
FIELD, END = "\x1f", "\x1e"


def write_checkpoint(
    folder: str,
    layout: str,
    number: int,
    ranks: dict[str, int | None],
    until: float = 1.0,
    own: Mapping[str, Any] | None = None,
) -> str:
    """Write checkpoint `number` below `folder` as `layout` has it; `until` < 1 stops after that
    part of its files.

    `ranks`: tensor, pipeline, data (numbers, or None for one) and zero (the stage or None). Returns
    the folder's name. The tracker, where the layout has one, is written where the framework writes
    it. `own`: the layout that run.yaml describes itself.
    """
    name, files, tracker = (
        _own_files(own, number) if own else checkpoint_files(layout, number, ranks)
    )
    made: set[str] = set()
    stop = len(files) if until >= 1 else max(int(len(files) * until), 1)
    first = ""
    for path, content in files[:stop]:
        full = os.path.join(folder, name, path)
        parent = os.path.dirname(full)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        # Thousands of equal shards: further names of one file are made, and deleted, in a fraction
        # of the time.
        if not (first and content is CONTENT and _link(first, full)):
            with open(full, "wb") as stream:
                stream.write(content)
            first = full if content is CONTENT else first
    if until >= 1 and tracker:
        with open(os.path.join(folder, tracker[0]), "w") as stream:
            stream.write(tracker[1])
    return name


def write_reference(environ: Mapping[str, str]) -> None:
    """open-instruct's DPO keeps its reference log-probabilities before its first step, and cannot
    resume without them."""
    folder = environ.get("REFERENCE_LOGPROBS_CACHE_PATH")
    if folder and not any(name.endswith(".pt") for name in os.listdir(folder)):
        with open(os.path.join(folder, "rehearsed.pt"), "wb") as stream:
            stream.write(CONTENT)


def write_export(folder: str, layout: str) -> None:
    """The model that a framework exports at its end, where its layout has one, the tokenizer
    last."""
    for name in (
        ("config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json")
        if layout == "open-instruct"
        else ()
    ):
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(CONTENT)


def write_model(folder: str) -> None:
    """The model that the run leaves for who comes after it, whole and empty; one that is there
    already is left alone."""
    if os.path.exists(os.path.join(folder, "config.json")):
        return
    os.makedirs(folder, exist_ok=True)
    for name, content in MODEL.items():
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(content)


def _link(source: str, target: str) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def checkpoint_files(
    layout: str, number: int, ranks: dict[str, int | None]
) -> tuple[str, list[tuple[str, bytes]], tuple[str, str] | None]:
    """(folder name, [(path, bytes)], (tracker file, its text) or None) of a whole checkpoint, see
    hpctrain/runtime/layouts.py."""
    tensor, data = ranks.get("tensor") or 1, ranks.get("data") or 1
    stages, zero = ranks.get("pipeline") or 0, ranks.get("zero")
    world = tensor * max(stages, 1) * data
    if layout == "deepspeed":
        return (
            f"global_step{number}",
            _deepspeed(tensor, stages, data, zero),
            ("latest", f"global_step{number}"),
        )
    if layout == "megatron":
        form = (
            "mp_rank_{:02d}_{:03d}/model_optim_rng.pt"
            if stages > 1
            else "mp_rank_{:02d}/model_optim_rng.pt"
        )
        files = [
            (form.format(tp, pp), CONTENT) for tp in range(tensor) for pp in range(max(stages, 1))
        ]
        return f"iter_{number:07d}", files, ("latest_checkpointed_iteration.txt", str(number))
    if layout == "verl":
        kinds = [
            (role, kind)
            for role in ("actor", "critic")
            for kind in ("model", "optim", "extra_state")
        ]
        files = [
            (f"{role}/{kind}_world_size_{world}_rank_{rank}.pt", CONTENT)
            for role, kind in kinds
            for rank in range(world)
        ]
        return (
            f"global_step_{number}",
            [*files, ("data.pt", CONTENT)],
            ("latest_checkpointed_iteration.txt", str(number)),
        )
    if layout == "hf-trainer":
        state = json.dumps({"global_step": number}).encode()
        files = [
            (name, CONTENT)
            for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        ]
        return f"checkpoint-{number}", [*files, ("trainer_state.json", state)], None
    if layout == "open-instruct":
        files = [
            (name, CONTENT) for name in ("pytorch_model.bin", "optimizer.bin", "scheduler.bin")
        ]
        files += [(f"random_states_{rank}.pkl", CONTENT) for rank in range(world)]
        return f"step_{number}", [*files, ("COMPLETED", b"COMPLETED")], None
    if layout in OTHERS:
        name, files, tracker_ = OTHERS[layout](number, world)
        return name, files, tracker_
    raise ValueError(f"no checkpoints of layout `{layout}` can be written")


class Metadata:
    """An index as torch.distributed.checkpoint pickles it; its readers ask for the attributes
    alone."""

    def __init__(self, names: list[str]) -> None:
        self.storage_data = {name: _StorageInfo(name) for name in names}


class _StorageInfo:
    def __init__(self, relative_path: str) -> None:
        self.relative_path, self.offset, self.length = relative_path, 0, len(CONTENT)


def _distributed(world: int, below: str = "") -> list[tuple[str, bytes]]:
    """The shards of a distributed checkpoint, and the index that names them, last."""
    names = [f"__{rank}_0.distcp" for rank in range(world)]
    index = pickle.dumps(Metadata(names), protocol=4)
    return [*((below + name, CONTENT) for name in names), (below + ".metadata", index)]


Files = tuple[str, list[tuple[str, bytes]], "tuple[str, str] | None"]


def _dcp(number: int, world: int) -> Files:
    return f"step-{number}", _distributed(world), None


def _accelerate(number: int, world: int) -> Files:
    # The other ranks do not wait for the first one, which writes the weights.
    names = [f"random_states_{rank}.pkl" for rank in reversed(range(world))]
    names += ["pytorch_model.bin", "optimizer.bin", "scheduler.bin"]
    return f"checkpoint_{number}", [(name, CONTENT) for name in names], None


def _olmo_core(number: int, world: int) -> Files:
    ranks = [(f"train/rank{rank}.pt", CONTENT) for rank in range(world)]
    files = [*ranks, *_distributed(world, "model_and_optim/"), (".metadata.json", b"{}")]
    return f"step{number}", files, None


def _lightning(number: int, world: int) -> Files:
    return f"epoch=0-step={number}.ckpt", [*_distributed(world), ("meta.pt", CONTENT)], None


def _nanotron(number: int, world: int) -> Files:
    form = "optimizer/optimizer_pp-0-of-1_dp-{}-of-{}_tp-0-of-1_exp-0-of-1.pt"
    names = ["model/model_config.bin", *(form.format(rank, world) for rank in range(world))]
    names.append("optimizer/optimizer_config.json")
    names += ["lr_scheduler/lr_scheduler.pt", "checkpoint_metadata.json"]
    json_files = {name: b"{}\n" for name in names if name.endswith(".json")}
    files = [(name, json_files.get(name, CONTENT)) for name in names]
    return str(number), files, ("latest.txt", str(number))


def _nemo(number: int, world: int) -> Files:
    last = [("weights/common.pt", CONTENT), ("weights/metadata.json", b"{}")]
    return f"model--step={number}-last", [*_distributed(world, "weights/"), *last], None


OTHERS: dict[str, Callable[[int, int], Files]] = {
    "dcp": _dcp,
    "torchtitan": _dcp,
    "accelerate": _accelerate,
    "olmo-core": _olmo_core,
    "lightning": _lightning,
    "nanotron": _nanotron,
    "nemo": _nemo,
}


def _own_files(own: Mapping[str, Any], number: int) -> Files:
    """A checkpoint of the layout that run.yaml describes: the files it lists, then the marker."""
    name = str(own["pattern"]).replace("*", "").replace("{iteration}", str(number))
    names = [*(own.get("files") or ["state.bin"]), *([own["marker"]] if own.get("marker") else [])]
    text = str(number) if own.get("tracker_holds") == "iteration" else name
    tracker = (str(own["tracker"]), text) if own.get("tracker") else None
    return name, [(file, CONTENT) for file in names], tracker


def _deepspeed(tensor: int, stages: int, data: int, zero: int | None) -> list[tuple[str, bytes]]:
    model = tensor * max(stages, 1)
    files: list[tuple[str, bytes]] = []
    if zero != 3:
        files += [(f"mp_rank_{mp:02d}_model_states.pt", CONTENT) for mp in range(model)]
    if stages:
        files += [
            (f"layer_{layer:02d}-model_{tp:02d}-model_states.pt", CONTENT)
            for layer in range(2 * stages)
            for tp in range(tensor)
        ]
    for mp in range(model):
        for dp in range(data if zero else 0):
            if zero == 3:
                files.append((f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt", CONTENT))
            files.append((f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt", CONTENT))
    return files


class Walk:
    """One attempt of rank 0: from the iteration that the guard chose to the target, a fault, or the
    time limit."""

    def __init__(self, folder: str, environ: os._Environ[str]) -> None:
        with open(os.path.join(folder, "scenario.json")) as stream:
            self.scenario: dict[str, Any] = json.load(stream)
        self.folder, self.environ = folder, environ
        self.asked_to_leave = False
        self.job = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "0") or "0"
        self.fault = ""
        # The other ranks read from it, and their wait ends when this process does.
        self.hold = os.open(os.path.join(folder, "hold"), os.O_RDWR)

    def tell(self, event: str, **fields: Any) -> None:
        """One record into the pipe, in one write."""
        pairs = [
            ("event", event),
            ("SLURM_JOB_ID", self.job[0]),
            ("SLURM_RESTART_COUNT", self.job[1]),
            *sorted(fields.items()),
        ]
        text = FIELD.join(f"{key}={value}" for key, value in pairs) + END
        pipe = os.open(os.path.join(self.folder, "records"), os.O_WRONLY)
        os.write(pipe, text.encode("utf-8", "surrogateescape"))
        os.close(pipe)

    def wait_for_ranks(self) -> None:
        """As the first collective does: until every task of the step has come."""
        ready = os.path.join(self.folder, "ready.{}.{}".format(*self.job))
        while not os.path.exists(ready):
            time.sleep(0.02)
        # The first start of the step plays the first fault, and so on, whichever link it belongs
        # to.
        starts = sum(1 for name in os.listdir(self.folder) if name.startswith("ready."))
        faults = self.scenario["faults"]
        self.fault = faults[starts - 1] if starts <= len(faults) else ""

    def freeze(self) -> None:
        """No progress from here on: whoever reads the records ends this job."""
        while not self.asked_to_leave:
            time.sleep(0.05)

    def run(self) -> int:
        plan = self.scenario
        signal.signal(
            signal.SIGUSR1 if plan["signal"] != "USR2" else signal.SIGUSR2, self._on_signal
        )
        if plan["saves_on_signal"] and plan["signal"] == "TERM":
            signal.signal(signal.SIGTERM, self._on_signal)
        self.wait_for_ranks()
        mode = self.environ.get("HPCTRAIN_MODE", "")
        counts_on = mode == "resume" or plan["counts_on"]
        number = int(self.environ.get("HPCTRAIN_ITERATION") or 0) if counts_on else 0
        base = plan["offset"]
        target, every = plan["target"], plan["save_every"] or plan["target"]
        begin = number
        strike = (
            min(begin + every + every // 2, begin + max((target - begin) // 2, 0))
            if self.fault
            else None
        )
        if strike is not None and (target - begin) > every:
            strike = min(begin + every + max(every // 2, 1), target - 1)
        # How far the time limit lets this link come, counted in iterations.
        most = begin + int(plan["time_s"] / plan["step_time_s"])
        lead = begin + int(max(plan["time_s"] - plan["lead_s"], 0) / plan["step_time_s"])
        self.tell("start", number=number, mode=mode)
        write_reference(self.environ)
        while number < target:
            save = min((number - base) // every * every + every + base, target)
            ends = [save]
            if self.fault in ("timeout", "node_fail"):
                ends.append(strike)
            ends.append(lead if plan["saves_on_signal"] else most)
            stop = max(min(end for end in ends if end is not None), number)
            time.sleep((stop - number) * plan["iteration_s"])
            number = stop
            if self.fault == "node_fail" and number == strike:
                self.tell("strike", number=number)
                self.freeze()
            if (self.fault == "timeout" and number == strike) or (
                number >= (lead if plan["saves_on_signal"] else most) and number < save
            ):
                self.tell("limit", number=number)
                self.freeze()
            if self.asked_to_leave:
                self._save(number, every)
                self.tell("left", number=number)
                return 0
            self._save(number, every, begin)
        if self.environ.get("HPCTRAIN_CHECKPOINT_DIR"):
            write_export(self.environ["HPCTRAIN_CHECKPOINT_DIR"], plan["layout"])
        if plan.get("model"):
            write_model(plan["model"])
        self.tell("end", number=number)
        return 0

    def _save(self, number: int, every: int, begin: int | None = None) -> None:
        plan = self.scenario
        folder = self.environ.get("HPCTRAIN_CHECKPOINT_DIR")
        if plan["layout"] == "none" or not folder:
            return
        half = (
            self.fault == "kill_mid_save"
            and begin is not None
            and (number - begin > every or number == plan["target"])
        )
        if half:
            self.tell("kill", number=number)
            write_checkpoint(folder, plan["layout"], number, plan["ranks"], 0.5, plan.get("own"))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(plan["save_s"])
        name = write_checkpoint(folder, plan["layout"], number, plan["ranks"], own=plan.get("own"))
        self.tell("saved", number=number, name=name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_leave = bool(self.scenario["saves_on_signal"])


def main(argv: list[str]) -> int:
    return Walk(argv[1], os.environ).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
