"""The same tokens, log-probabilities, losses and training as TRL's DPOTrainer; its answers were
kept by tools/trl_vectors.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import tiny
from .conftest import Bench

TRL: dict[str, Any] = json.loads((tiny.DATA / "trl.json").read_text())
ROWS = {"text": tiny.text_rows(6, 3), "messages": tiny.message_rows(6, 3)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    from hpctrain.train.dpo.model import dpo_model_config, read_pretrained

    folder = tmp_path_factory.mktemp("models")
    policy, other = tiny.write_model(folder / "policy"), tiny.write_model(folder / "other", seed=1)
    return (
        policy,
        *(
            read_pretrained(str(path), dpo_model_config(str(path), "sdpa"))
            for path in (policy, other)
        ),
    )


@pytest.mark.parametrize("shared", [False, True], ids=["a row a reply", "prompts shared"])
@pytest.mark.parametrize(
    "case", TRL["batches"], ids=lambda case: f"{case['shape']} {case['loss_type']} {case['beta']}"
)
def test_tokens_and_loss_of_a_batch_are_trls(
    models: tuple[Path, Any, Any], case: dict[str, Any], shared: bool
) -> None:
    import torch

    from hpctrain.train.dpo.batches import lay_out
    from hpctrain.train.dpo.loss import dpo_loss
    from hpctrain.train.dpo.model import to_tensors
    from hpctrain.train.dpo.pairs import Pairs, load_tokenizer, tokenize
    from hpctrain.train.dpo.records import parse_record

    folder, policy, other = models
    records = [parse_record(row) for row in ROWS[case["shape"]]]
    flat = tokenize(records, load_tokenizer(str(folder)))
    whole, pairs = Pairs(flat, 10_000), Pairs(flat, TRL["max_len"])
    tokens = [
        {name: getattr(whole[n], name).tolist() for name in ("prompt", "chosen", "rejected")}
        for n in range(6)
    ]
    assert [row for row in tokens if len(row["prompt"]) < TRL["max_len"]] == case["tokens"]

    chosen_pairs = [pairs[n] for n in range(len(pairs))]
    rows = to_tensors(lay_out(chosen_pairs, shared), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        logps = [part for model in (policy, other) for part in model(**rows).chunk(2)]
    sizes = None
    if case["loss_type"] == "sigmoid_norm":
        sizes = tuple(
            torch.tensor([len(getattr(pair, name)) for pair in chosen_pairs])
            for name in ("chosen", "rejected")
        )
    losses, _, _ = dpo_loss(*logps, case["beta"], num_tokens=sizes)

    for found, name in zip(logps, ("chosen", "rejected", "ref_chosen", "ref_rejected")):
        assert np.abs(found.numpy() - case[name]).max() < 5e-5, name  # of sums around -50
    assert abs(losses.mean().item() - case["loss"]) < 1e-5


def test_five_steps_of_training_are_trls(bench: Bench) -> None:
    orders = []
    for number, case in enumerate(TRL["trained"]):
        training = {key: case[key] for key in ("loss_type", "beta")}
        orders.append(
            bench.order(
                f"trl{number}",
                training={**training, "max_steps": 5, "save_steps": 100},
                dataset={"dataset_name": "./four.jsonl", "max_len": 32},
            )
        )
    answers = bench.train_many(orders, 1)

    assert [answer.code for answer in answers] == [0] * len(orders), answers
    for number, case in enumerate(TRL["trained"]):
        metrics = bench.metrics(f"trl{number}")
        losses, norms = ([metrics[n][key] for n in range(1, 6)] for key in ("loss", "grad_norm"))
        assert np.abs(np.subtract(losses, case["losses"])).max() < 1e-5
        assert np.abs(np.divide(norms, case["grad_norms"]) - 1).max() < 1e-3
        assert (
            np.abs(np.subtract([metrics[n]["margin"] for n in range(1, 6)], case["margins"])).max()
            < 1e-3
        )


def test_the_known_answers_of_the_formula() -> None:
    """Recomputed by hand and with the code of the paper's authors, whose formula it is."""
    import torch

    from hpctrain.train.dpo.loss import dpo_loss

    def loss(*values: float, beta: float = 0.1, smoothing: float = 0.0) -> float:
        return dpo_loss(*(torch.tensor([value]) for value in values), beta, smoothing)[0].item()

    assert loss(-10, -12, -10, -12) == pytest.approx(0.6931472, abs=1e-6)
    assert loss(-10, -12, -11, -11) == pytest.approx(0.5981389, abs=1e-6)
    assert loss(-10, -12, -11, -11, smoothing=0.1) == pytest.approx(0.6181388, abs=1e-6)
    assert loss(-20, -10, -15, -15, beta=0.5) == pytest.approx(5.0067153, abs=1e-6)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_scored_as_the_family_s_own_logits_say(family: str) -> None:
    import torch
    import transformers

    from hpctrain.train.dpo import model as dpo
    from hpctrain.train.dpo.batches import Pair, lay_out

    assert set(FAMILIES) == set(dpo.FAMILIES)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **({} if family == "gpt_neox" else {"num_key_value_heads": 2}),
        max_position_embeddings=64,
        **FAMILIES[family],
    )
    config._attn_implementation, config.use_cache = "sdpa", False
    torch.manual_seed(0)
    model = dpo.model_class(config)(config).eval()
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(model.state_dict())
    rng = np.random.RandomState(0)
    pairs = [
        Pair(*(rng.randint(0, 96, size).astype(np.int32) for size in sizes))
        for sizes in ((5, 3, 7), (0, 4, 2), (1, 1, 6))
    ]
    expected = []
    for name in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.from_numpy(
                np.concatenate([pair.prompt, getattr(pair, name)]).astype(np.int64)
            )
            logps = (
                plain(input_ids=ids[None])
                .logits[0]
                .float()
                .log_softmax(-1)[:-1]
                .gather(1, ids[1:, None])[:, 0]
            )
            expected.append(logps[max(0, len(pair.prompt) - 1) :].sum().item())
    assert dpo.can_share_prompt(config, "sdpa")

    for shared in (False, True):
        found = model(
            **dpo.to_tensors(lay_out(pairs, shared, 4), torch.float32, torch.device("cpu"))
        )
        assert np.abs(found.detach().numpy() - expected).max() < 1e-4, shared


def test_logits_in_parts_give_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, models: tuple[Path, Any, Any]
) -> None:
    import torch

    from hpctrain.train.dpo import model as dpo
    from hpctrain.train.dpo.batches import Pair, lay_out

    policy = models[1]
    rng = np.random.RandomState(1)
    rows = lay_out(
        [Pair(*(rng.randint(0, 384, 9).astype(np.int32) for _ in range(3))) for _ in range(2)], True
    )
    gradients = []
    for limit in (2**26, 384 * 5):
        monkeypatch.setattr(dpo, "MAX_LOGITS", limit)
        policy.zero_grad()
        policy(**dpo.to_tensors(rows, torch.float32, torch.device("cpu"))).sum().backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
        )
    policy.zero_grad()

    assert all(
        torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-4)
        for name in gradients[0]
    )
