"""The step lines of each training framework: bytes of one line -> Step. Pure; a line that is not
one gives None.

| framework | line | source |
|---|---|---|
| neox, megatron, hpctrain's own | `iteration 10/ 100 | … | lm_loss: 2.1E+00 | … |` | megatron/logging.py of both |
| open-instruct | `Step: 1, LR: 0.00075, Loss: 6.2693, TPS: 1341.9` | open_instruct/finetune.py |
| hf (Trainer, TRL) | `{'loss': 0.69, 'grad_norm': …}`; transformers 5 quotes the numbers | trainer_callback.py |
| verl | `step:10 - actor/pg_loss:0.1 - …` | utils/logger/aggregate_logger.py |
| em-dpo | `train stats after 64 examples: {'loss/train': '0.69', …}` | trainers.py |
| deepspeed | `step=10, skipped=0, lr=[1e-05], …` | runtime/engine.py `_report_progress` |
| any | `step 10 … loss 2.3`, `loss=2.3` | what people print themselves |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from hpctrain.triage.records import Step, last_match

_N = rb"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|[nN][aA][nN]|[iI]nf(?:inity)?)"
_ITERATION = re.compile(rb"\biteration:?\s+(\d+)(?:\s*\[\s*\d+\])?\s*(?:/\s*(\d+))?")
# The line as GPT-NeoX and hpctrain print it today, in one go; any other order of fields takes the
# slow way.
_NEOX = re.compile(
    rb"(?:samples/sec: (\S+) \| )? ?iteration +(\d+)/ *(\d+) \| elapsed time per iteration \(ms\):"
    rb" (\S+) \| learning rate: (\S+) \|"
    rb"(?: approx flops per GPU: \S+ \|)? lm_loss: (\S+) \|(?: loss scale: \S+ \|)?(?: grad norm:"
    rb" (\S+) \|)?[^\n]*?"
    rb" number of skipped iterations: *(\d+) \| number of nan iterations: *(\d+) \|"
)
_OPEN_INSTRUCT = re.compile(
    rb"Step: (\d+), LR: (%s), Loss: (%s)(?:,? Aux Loss: %s)?(?:, TPS: (%s))?" % (_N, _N, _N, _N)
)
_HF_PAIR = re.compile(rb"['\"]([\w/.@()-]+)['\"]: ?['\"]?(%s)['\"]?(?=[,}\s])" % _N)
_TQDM = re.compile(rb"(\d+)/(\d+) \[[\d:?]+<")
_VERL_STEP = re.compile(rb"\bstep:(\d+) - ")
_VERL_PAIR = re.compile(rb"([\w@./()-]+):(?:np\.float\d+\()?(%s)\)?(?= - |\s*$)" % _N)
_EM = re.compile(rb"train stats after (\d+) examples: ")
_DEEPSPEED = re.compile(rb"\bstep=(\d+), skipped=(\d+), lr=\[?(%s)?" % _N)
_ANY_LOSS = re.compile(rb"[lL]oss['\"]?\s*[:= ]\s*['\"]?(%s)(?![\w.])" % _N)
_BEFORE_LOSS = re.compile(
    rb"(?:^|[^\w/])(?:(?:train|losses)/)?(?:(?:train|training|lm|total|step|batch|avg"
    rb"|average|mean)[_"
    rb" ])?c?$",
    re.IGNORECASE,
)
# Each begins with the letters that it may begin with: a search then skips all others at the speed
# of C.
_ANY_STEP = re.compile(
    rb"[sSiIuUnNgGtT](?<![\w/].)(?i:(?:(?<=n)um_|(?<=g)lobal_|(?<=t)rain_)(?:step|iter"
    rb"|iteration|update)|(?<=s)tep|(?<=i)ter(?:ation)?|(?<=u)pdate)[sS]?"
    rb"['\"]?\s*[:= #]\s*(\d+)(?![\d%]|\.\d)\s*(?:(?:/|of)\s*(\d+))?"
)
# `Epoch: [0][415/1736]`, as torchvision's and OpenMMLab's loops print it
_ANY_PLACE = re.compile(rb"\[ *(\d+)/(\d+)\]")
_ANY_NORM = re.compile(
    rb"[gG](?<![\w/].)(?i:rad(?:ient)?[_ ]?norm)['\"]?\s*[:= ]\s*['\"]?(%s)" % _N
)
_ANY_LR = re.compile(rb"[lL](?<![\w/].)(?i:r|earning[_ ]rate)['\"]?\s*[:= ]\s*\[?['\"]?(%s)" % _N)
_NOT_TRAINING = re.compile(
    rb"[eEvVtTdD](?<![\w/].)(?i:(?<=e)val|(?<=v)al(?:id(?:ation)?)?|(?<=t)est|(?<=d)ev)[_ /]"
)

# Anchors after which a line may be a step line, and the parser of each.
Parser = Callable[[bytes], "Step | None"]


def megatron(line: bytes) -> Step | None:
    """GPT-NeoX, Megatron-LM, Megatron-DeepSpeed and hpctrain's own trainers, in whatever order they
    print the fields."""
    found = _NEOX.search(line)
    if found:
        try:
            rate, iteration, total, elapsed_ms, lr, loss, norm, skipped, nan = found.groups()
            return Step(
                "neox",
                int(iteration),
                int(total),
                float(loss),
                float(norm) if norm else None,
                float(lr),
                float(elapsed_ms) / 1000,
                None,
                float(rate) if rate else None,
                int(skipped),
                int(nan),
            )
        except ValueError:
            pass
    found = _ITERATION.search(line)
    if not found:
        return None
    fields: dict[bytes, float] = {}
    for part in line[found.end() :].split(b"|"):
        name, colon, value = part.rpartition(b":")
        if colon:
            number = _float(value.strip())
            if number is not None:
                fields[name.strip().lower()] = number
    loss = fields.get(b"lm_loss", fields.get(b"lm loss"))
    if loss is None and b"number of skipped iterations" not in fields:
        return None
    elapsed = fields.get(b"elapsed time per iteration (ms)")
    return Step(
        "megatron" if b"lm loss" in fields else "neox",
        int(found[1]),
        int(found[2]) if found[2] else None,
        loss,
        fields.get(b"grad norm"),
        fields.get(b"learning rate"),
        elapsed / 1000 if elapsed else None,
        None,
        fields.get(b"samples per second", fields.get(b"samples/sec"))
        or _leading_rate(line[: found.start()]),
        _count(fields.get(b"number of skipped iterations")),
        _count(fields.get(b"number of nan iterations")),
    )


def open_instruct(line: bytes) -> Step | None:
    found = last_match(_OPEN_INSTRUCT, line)  # behind a progress bar there may be several
    if not found:
        return None
    return Step(
        "open-instruct",
        int(found[1]),
        None,
        _float(found[3]),
        None,
        _float(found[2]),
        tokens_per_s=_float(found[4]) if found[4] else None,
    )


def hugging_face(line: bytes) -> Step | None:
    """transformers' `{'loss': …}` of both generations, and TRL's; evaluation and summary lines are
    none."""
    pairs = dict(_HF_PAIR.findall(line, max(line.find(b"{"), 0)))
    loss = pairs.get(b"loss")
    if loss is None or b"train_runtime" in pairs:
        return None

    def number(name: bytes) -> float | None:
        return float(pairs[name]) if pairs.get(name) else None

    step, total = (
        int(pairs[name]) if pairs.get(name, b"").isdigit() else None
        for name in (b"step", b"max_steps")
    )
    # The last two, and the step, are said by hf-sft's own driver.
    return Step(
        "hf",
        step,
        total,
        float(loss),
        number(b"grad_norm"),
        number(b"learning_rate"),
        epoch=number(b"epoch"),
        step_time_s=number(b"step_time"),
        samples_per_s=number(b"samples_per_second"),
    )


def em_dpo(line: bytes) -> Step | None:
    found = _EM.search(line)
    if not found:
        return None
    pairs = {name: _float(value) for name, value in _HF_PAIR.findall(line, found.end())}
    return Step(
        "em-dpo",
        int(found[1]),
        None,
        pairs.get(b"loss/train"),
        pairs.get(b"grad_norm"),
        samples_per_s=pairs.get(b"examples_per_second"),
    )


def verl(line: bytes) -> Step | None:
    found = _VERL_STEP.search(line)
    if not found:
        return None
    pairs = {name: _float(value) for name, value in _VERL_PAIR.findall(line, found.end())}
    loss = pairs.get(
        b"actor/pg_loss",
        pairs.get(b"actor/loss", pairs.get(b"critic/vf_loss", pairs.get(b"train/loss"))),
    )
    norm = pairs.get(
        b"actor/grad_norm", pairs.get(b"train/grad_norm", pairs.get(b"critic/grad_norm"))
    )
    if not pairs:
        return None
    return Step(
        "verl",
        int(found[1]),
        None,
        loss,
        norm,
        pairs.get(b"actor/lr", pairs.get(b"train/lr")),
        pairs.get(b"perf/time_per_step"),
        pairs.get(b"perf/throughput"),
    )


def deepspeed(line: bytes) -> Step | None:
    found = _DEEPSPEED.search(line)
    if not found:
        return None
    return Step(
        "deepspeed",
        int(found[1]),
        lr=_float(found[3]) if found[3] else None,
        skipped=int(found[2]),
        cumulative=True,
    )


def anything(line: bytes) -> Step | None:
    """`step 10 loss 2.3` in the spellings people use; needs both a step and a loss."""
    loss = next(
        (
            found
            for found in _ANY_LOSS.finditer(line)
            if _BEFORE_LOSS.search(line[max(found.start() - 24, 0) : found.start()])
        ),
        None,
    )
    step = _ANY_STEP.search(line) or _ANY_PLACE.search(line) or _TQDM.search(line)
    if not loss or not step or _NOT_TRAINING.search(line):
        return None
    norm, lr = _ANY_NORM.search(line), _ANY_LR.search(line)
    return Step(
        "any",
        int(step[1]),
        int(step[2]) if step[2] else None,
        _float(loss[1]),
        _float(norm[1]) if norm else None,
        _float(lr[1]) if lr else None,
    )


STEP_ANCHORS: tuple[tuple[bytes, Parser], ...] = (
    (b"lm_loss:", megatron),
    (b"lm loss:", megatron),
    (b"number of skipped iterations", megatron),
    (b", Loss: ", open_instruct),
    (b"'loss':", hugging_face),
    (b'"loss":', hugging_face),
    (b"train stats after ", em_dpo),
    (b"_loss:", verl),
    (b"/loss:", verl),
    (b", skipped=", deepspeed),
    (b" loss ", anything),
    (b"loss: ", anything),
    (b"loss=", anything),
    (b"loss : ", anything),
    (b"Loss: ", anything),
    (b"Loss=", anything),
    (b"Loss ", anything),
)


def tqdm_before(text: bytes, position: int) -> tuple[int, int] | None:
    """(step, total) of the last tqdm bar shortly before `position`: transformers' lines do not say
    which step they are of."""
    end = text.rfind(b"it", max(position - 400, 0), position)
    found = last_match(_TQDM, text, max(end - 120, 0), position) if end >= 0 else None
    return (int(found[1]), int(found[2])) if found else None


def _leading_rate(text: bytes) -> float | None:
    name, colon, value = text.replace(b"|", b" ").rpartition(b"samples/sec:")
    return _float(value.strip()) if colon else None


def _float(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _count(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) else None
