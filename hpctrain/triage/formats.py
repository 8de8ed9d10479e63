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

from hpctrain.triage.normal import without_prefix
from hpctrain.triage.records import Step, last_match

_N = (
    rb"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
    rb"|[nN][aA][nN]|[iI]nf(?:inity)?)"
)
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
_OF_STEPS = re.compile(rb"'global_step/max_steps': '(\d+)/(\d+)'")
_TQDM = re.compile(rb"(\d+)/(\d+) \[[\d:?]+<")
_VERL_STEP = re.compile(rb"\bstep:(\d+) - ")
_VERL_PAIR = re.compile(rb"([\w@./()-]+):(?:np\.float\d+\()?(%s)\)?(?= - |\s*$)" % _N)
_EM = re.compile(rb"train stats after (\d+) examples: ")
_DEEPSPEED = re.compile(rb"\bstep=(\d+), skipped=(\d+), lr=\[?(%s)?" % _N)
# A figure with its name: `loss: 2.3`, `loss = 2.3`, `'loss': 2.3`, `loss/avg | 2.3`.
_RECORD = re.compile(rb"\{['\"]\w+['\"]: ")  # a step's figures as Python or JSON shows them
_BETWEEN = rb"['\"]?(?:\s*(?:[:=|]|\xe2\x94\x82)\s*|\s+)['\"]?"
_ANY_LOSS = re.compile(
    rb"[lL](?:oss|OSS)(?:es)?((?:[/_ ](?:train|total|avg|mean|policy_avg|step|all|overall)){0,2})"
    + _BETWEEN
    + rb"(%s)(?![\w.,]*[\w])" % _N
)
_WORDS = re.compile(rb"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
# Losses beside the one that is trained, or of something else: not the figure to judge by.
_BESIDE = frozenset(
    (
        b"aux auxiliary z zloss load balance balancing balanced router val valid validation eval"
        b" evaluation test dev mtp vf value critic kl entropy ent reg regularization indexer moe lb"
        b" seq weight scale best min prev previous last gate expert per no info target zero"
        b" stop of"
    ).split()
)
_NAMES_EVAL = re.compile(
    rb"[eEvVtTdD](?<![\w/].)(?i:(?<=e)val(?:uat\w+)?|(?<=v)al(?:id(?:at\w+)?)?|(?<=t)est|(?<=d)ev)"
    rb"[_ /:=|]"
)
_ESTIMATE = re.compile(
    rb"train loss [\d.einfa+-]+, val loss", re.IGNORECASE
)  # nanoGPT's evaluation
# Each begins with the letters that it may begin with: a search then skips all others at the speed
# of C.
_ANY_STEP = re.compile(
    rb"[sSiIuUnNgGtT](?<![\w/].)(?i:(?:(?<=n)um_|(?<=g)lobal[_ ]|(?<=t)rain(?:ing)?[_ ])?"
    rb"(?:step|iter|iteration|update)|(?<=s)tep|(?<=i)ter(?:ation)?|(?<=u)pdate)[sS]?"
    rb"(?:\(train\))?"
    rb"['\"]?\s*[:= #]\s*(?:\[\s*)?(\d+)(?![\d%]|\.\d*[1-9])(?:\.0*)?\s*(?:(?:/|of)\s*(\d+))?"
)
# `Epoch: [0][415/1736]`, `Train: 0 [  50/1251 (4%)]`, as loops for images print it; torchtune's bar
_ANY_PLACE = re.compile(
    rb"\[ *(\d+)/ *(\d+)(?=[\] (])|(?<![\d|])\d+\|(\d+)\|Loss"
    rb"|(?<![\d/])(\d+)/(\d+) \xe2\x94\x81"
    rb"|(\d+(?:\.\d+)?[kM]?)it/(\d+(?:\.\d+)?[kM]?)it\b"
)
_EPOCH = re.compile(rb"\b[Ee]poch[ :=\[#]+(\d+)(?:\s*(?:/|of)\s*(\d+))?")
_ANY_NORM = re.compile(
    rb"[gG](?<![\w/].)(?i:rad(?:ient)?[._]?[_ ]?norm)['\"]?\s*[:= ]\s*['\"]?(%s)" % _N
)
_ANY_LR = re.compile(rb"[lL](?<![\w/].)(?i:r|earning[_ ]rate)['\"]?\s*[:= ]\s*\[?['\"]?(%s)" % _N)
_SI = {b"k": 1e3, b"m": 1e6, b"g": 1e9, b"b": 1e9, b"t": 1e12}
_FIGURE = rb"(\d(?:[\d.,]*\d)?(?:[eE][-+]?\d+)?[KMGBT]?)"
_SECONDS = re.compile(
    rb"[sSiItTeEdD](?<![\w/].)(?i:(?<=s)tep[_ ]time|(?<=i)ter(?:ation)?[_ ]time"
    rb"|(?<=t)ime[_/ ]per[_ ](?:step|iter(?:ation)?)|(?<=e)lapsed time per iteration"
    rb"|(?<=s)ec(?:ond)?s?(?:/|[_ ]per[_ ])(?:step|it)|(?<=t)ime/step|(?<=d)t|(?<=s)econds"
    rb"|(?<=t)rain_step_timing in s)(?:_?s)?((?:_ms| \(ms\))?)['\"]?\s*[:=]\s*"
    + _FIGURE
    + rb"\s*(ms\b)?"
)
_TOKENS = re.compile(
    rb"[tTwW](?<![\w].)(?i:(?<=t)ps|(?<=t)gs|(?<=w)ps|(?<=t)ok(?:en)?s?(?:/|_per_)s(?:ec(?:ond)?)?"
    rb"(?:(?:/|_per_)(?:gpu|device))?)['\"]?\s*[:=]?\s*" + _FIGURE
)
_TOKENS_AFTER = re.compile(_FIGURE + rb" (?i:tok(?:en)?s?(?:/s|/sec| per second))\b")

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
    seconds, tokens = (elapsed / 1000, None) if elapsed else rates_in(line)
    return Step(
        "megatron" if b"lm loss" in fields else "neox",
        int(found[1]),
        int(found[2]) if found[2] else None,
        loss,
        fields.get(b"grad norm", fields.get(b"grad_norm")),
        fields.get(b"learning rate", fields.get(b"lr")),
        seconds,
        tokens,
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
    if step is None and (of := _OF_STEPS.search(line)):
        step, total = int(of[1]), int(of[2])  # ms-swift
    # `max_steps`, the last two, and the step, are said by hf-sft's own driver.
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
    loss = loss_in(line)
    if loss is None or _ESTIMATE.search(line):
        return None
    place = place_in(line) or ((None, None) if _RECORD.search(line) else None)
    if place is None:
        return None
    norm, lr = _ANY_NORM.search(line), _ANY_LR.search(line)
    step_time_s, tokens_per_s = rates_in(line)
    return Step(
        "any",
        place[0],
        place[1],
        loss,
        _float(norm[1]) if norm else None,
        _float(lr[1]) if lr else None,
        step_time_s,
        tokens_per_s,
    )


def loss_in(line: bytes) -> float | None:
    """The loss that is trained, among those that a line tells; None where it tells none, or only
    such of an evaluation."""
    for found in _ANY_LOSS.finditer(line):
        before = line[max(found.start() - 40, 0) : found.start()]
        name, _, word = before.rpartition(b" ")
        near = name[-24:] if name[-1:].isalnum() else b""
        words = _WORDS.findall(word) if word else _WORDS.findall(near)[-2:]
        lower = [part.lower() for part in words]
        if lower[-2:] == [b"cross", b"entropy"]:
            del lower[-2:]
        if not _BESIDE.intersection(lower[-1:] if not word else lower):
            cut = line[: found.start()]
            return None if _NAMES_EVAL.search(cut) else _float(found[2])
    return None


_REWARD = re.compile(
    rb"[rR]eward['\"]?(?:[ /_](?:mean|avg|score))?" + _BETWEEN + rb"%s(?![\w.])" % _N
)


def rewarded(line: bytes) -> Step | None:
    """`Step 7 | Reward 0.31`: a step of a policy, told without its loss."""
    place = _ANY_STEP.search(line) if _REWARD.search(line) else None
    if not place or _NAMES_EVAL.search(line):
        return None
    return Step("any", int(place[1]), int(place[2]) if place[2] else None)


def place_in(line: bytes) -> tuple[int, int | None] | None:
    """(step, total) that a line tells, in the spellings people use."""
    found = _ANY_STEP.search(line) or _ANY_PLACE.search(line) or _TQDM.search(line)
    found = found or _EPOCH.search(line)
    if not found:
        return None
    numbers = [_float(number) or 0.0 for number in found.groups() if number]
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None


def rates_in(line: bytes) -> tuple[float | None, float | None]:
    """(seconds of a step, tokens a second) that a line tells beside its loss."""
    time, tokens = _SECONDS.search(line), _TOKENS.search(line)
    if tokens is None and b" tok" in line:
        tokens = _TOKENS_AFTER.search(line)
    seconds = _float(time[2]) if time else None
    if seconds is not None and time and (time[1] or time[3]):
        seconds /= 1000
    return seconds, _float(tokens[1]) if tokens else None


# A line that tells a step whose figures stand below it, in lines or a table of their own.
_HEADER = re.compile(
    rb"\[(?:step|batch|iter(?:ation)?)=(\d+)(?:/(\d+))?[,\]]"
    rb"|^[^\w\n]*(?:Global |Train(?:ing)? |Optimizer |Rollout )?(?:[Ss]tep|Iteration|Rollout):?\s+"
    rb"(\d+)\s*(?:(?:/|of)\s*(\d+)\b|[^\w\n]*$)"
    rb"|\bTrain step (\d+)/(\d+) done"
    rb"|^[^\w\n]*(?:global_?step|training_?step|step|iterations?|total_timesteps)\s*"
    rb"(?:\xe2\x94\x82|\|)\s*(\d+)\b"
)
HEADER_ANCHORS = (
    b"[step=",
    b"[batch=",
    b"[iter=",
    b"Step ",
    b"Step:",
    b"Rollout ",
    b"Iteration ",
    b"in step ",
    b"ining_step",
    b"lobal_step",
    b"ations  ",
    b"total_timesteps",
    b" step ",
    b" step:",
)
FAR = 300  # lines from a header to its loss


def header(line: bytes) -> tuple[int, int | None] | None:
    """(step, total) of a line that only heads the figures of a step."""
    if b"oss" in line:
        return None
    found = _HEADER.search(without_prefix(line))
    numbers = [number for number in found.groups() if number] if found else []
    if not numbers:
        return None
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None


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
    *(
        (word, anything)
        for word in (
            b"loss:",
            b"loss=",
            b"loss ",
            b"loss'",
            b'loss"',
            b"loss/",
            b"Loss:",
            b"Loss=",
            b"Loss ",
            b"loss_avg",
            b"LOSS:",
        )
    ),
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
    """The number, with commas between thousands and a letter for them too: `26,380.94`, `98.5K`."""
    try:
        return float(text)
    except ValueError:
        pass
    scale = _SI.get(text[-1:].lower())
    try:
        return float((text[:-1] if scale else text).replace(b",", b"")) * (scale or 1)
    except ValueError:
        return None


def _count(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) else None
