"""Each pattern of a failure, and each way of printing a step, has a line that it matches and one
that it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpctrain.triage import formats
from hpctrain.triage.patterns import PATTERNS

DATA = Path(__file__).parents[2] / "data"
PROOFS = json.loads((DATA / "triage-patterns.json").read_text(encoding="utf-8"))


def test_every_pattern_is_proven_in_the_order_of_the_table():
    table = [(pattern.failure, pattern.anchor.decode()) for pattern in PATTERNS]
    assert [(proof["failure"], proof["anchor"]) for proof in PROOFS] == table


@pytest.mark.parametrize(
    ("pattern", "proof"),
    list(zip(PATTERNS, PROOFS)),
    ids=[f"{proof['failure']} {proof['anchor'].strip()}" for proof in PROOFS],
)
def test_a_pattern_matches_its_line_and_not_its_neighbour(pattern, proof):
    line, other = proof["yes"].encode(), proof["no"].encode()
    assert pattern.anchor in line and pattern.matches(line)
    assert pattern.anchor in other and not pattern.matches(other)
    assert not pattern.matches(b'    raise RuntimeError("' + line.strip() + b'")')


STEPS = [
    (b"Epoch 1 | iter 16 step 1 | loss train: 4.551, val: n/a | iter time: 316.1 ms", 16, 4.551),
    (b"Training epoch 0, iteration 9/99 | reduced_train_loss: 1.23 | val_loss: 4.1", 9, 1.23),
    (b"global step 4: loss = 64.2655 (16.926 sec/step)", 4, 64.2655),
    (b"step 00010/21400 (0.05%) | loss: 8.12 | grad_norm: 1.2 | tok/sec: 1,023,123", 10, 8.12),
    (b"completed step: 58, seconds: 3.355, Tokens/s/device: 5072.3, loss: 3.000", 58, 3.0),
    (b"Step 12 | Time: 34.21s | Loss: 0.0123 | Entropy: 0.5 | Grad. Norm: 0.1", 12, 0.0123),
    (b"Epoch: 0 | Step: 19 | PPO Epoch: 1 | Actor Loss: 0.01 | Critic Loss: 0.02", 19, 0.01),
    (b"1|20|Loss: 1.234:  12%|#  | 20/100 [00:10<00:20, 1.2it/s]", 20, 1.234),
    (b"Train: 0 [  50/1251 (  4%)]  Loss: 6.9 (6.95)  Time: 0.3s", 50, 6.9),
    (b"step 3: {'train/loss': 0.01, 'train/pg_loss': 0.0, 'train/grad_norm': 0.3}", 3, 0.01),
    (b"Step 1 | loss:1.23 lr:1e-05 tokens_per_second_per_gpu:1000", 1, 1.23),
    (b"Iter(train) [  10/ 1000]  lr: 2e-5  time: 1.2  loss: 1.4", 10, 1.4),
    (b"Epoch 5/20 - loss: 0.23 - val_loss: 0.3", 5, 0.23),
    (b"Train Metrics (step 10) - NLL Loss: 2.3 | Gradient Norm: 1.2", 10, 2.3),
    (b"Progress on:train 1.2kit/10.0kit rate:1.9it/s postfix:loss=4.90", 1200, 4.9),
    (b"Epoch 0:   1%| | 795/77225 [9:07<8:01, 41.36s/it, loss=3.1, v_num=0]", 795, 3.1),
]


@pytest.mark.parametrize(("line", "iteration", "loss"), STEPS)
def test_a_step_is_read_as_each_framework_prints_it(line, iteration, loss):
    step = formats.anything(line)
    assert step is not None and (step.iteration, step.loss) == (iteration, loss)


@pytest.mark.parametrize(
    "line",
    [
        b"eval step 5: loss 2.3",
        b"step 3000: train loss 4.0390, val loss 4.0427",
        b"step 10: val_loss 2.3",
        b"step 10: aux loss: 0.01",
        b"step 10: Critic Loss: 0.01",
        b"step 10: train/load balancing loss=0.003",
        b"step 10: the loss function is cross entropy",
    ],
)
def test_an_evaluation_or_a_loss_beside_the_one_that_is_trained_is_no_step(line):
    assert formats.anything(line) is None


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (b"[2026] INFO [console_logger:62, rank=0] [step=10/400,epoch=1,eta=26m]", (10, 400)),
        (b"================ Step 7/300 ================", (7, 300)),
        ("│ Global Step:   1/40 │ Progress: ".encode(), (1, 40)),
        (b"[batch=1/4800]:", (1, 4800)),
        (b"Epoch 1/10 Step 3/1870 Train step 3/18700 done.", (3, 18700)),
        ("│ │ training_step            │ 3       │ │".encode(), (3, None)),
        (b"Step 2: loading the model", None),
        (b"Step 5 of the setup is done", None),
    ],
)
def test_a_line_that_only_heads_a_steps_figures_names_it(line, place):
    assert formats.header(line) == place


def test_numbers_are_read_with_commas_and_letters_for_thousands():
    line = (
        b"iteration: 5 / 90 | time_per_iteration_ms: 11.5K | tokens_per_sec: 22.8K | lm_loss: 10.9"
    )
    step = formats.megatron(line)
    assert step is not None and (step.step_time_s, step.tokens_per_s) == (11.5, 22800.0)
