"""A packed row trains what its documents would train alone: no position sees another document."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from .conftest import Bench, dialogues, write_indexed

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
FAMILIES = {"llama.json": "attention_dropout", "neox.json": "hidden_dropout"}


def model_and_rows(bench: Bench, family: str, attention: str, **keys: Any) -> Any:
    from hpctrain.config.trainers.sft import SftConfig
    from hpctrain.train.sft.data import PackedRows
    from hpctrain.train.sft.model import build_model, read_model_config

    write_indexed(bench.path / "few", dialogues(12))
    config = SftConfig(
        model=str(bench.path / family),
        train_data_paths=(str(bench.path / "few"),),
        seq_length=64,
        attention=attention,
        loss_mask_pairs=(7, 7),
        loss_mask_alternating_individual=(8,),
        **keys,
    )
    model_config = read_model_config(config.model)
    setattr(model_config, FAMILIES[family], 0.0)
    return build_model(config, model_config, None, seed=3), PackedRows(config)


def loss_and_gradient(
    model: Any, rows: Any, samples: list[int], attention: str
) -> tuple[float, int, np.ndarray]:
    import torch

    from hpctrain.train.sft.model import to_tensors

    model.zero_grad()
    batch = rows.micro_batch(samples)
    loss = model(**to_tensors(batch, attention, torch.float32, torch.device("cpu")))
    loss.backward()
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    return float(loss), len(batch.labels), gradient.numpy().copy()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_loss_and_gradient_of_each_document_alone(
    bench: Bench, family: str, attention: str
) -> None:
    model, packed = model_and_rows(bench, family, attention)
    _, alone = model_and_rows(bench, family, attention, pack_impl="unpacked")
    assert len(packed) < len(alone) == 12

    one = loss_and_gradient(model, packed, list(range(len(packed))), attention)
    parts = [loss_and_gradient(model, alone, [sample], attention) for sample in range(12)]

    assert one[0] == pytest.approx(sum(part[0] for part in parts), rel=1e-5)
    assert one[1] == sum(part[1] for part in parts)
    gradient = np.sum([part[2] for part in parts], axis=0)
    assert np.abs(one[2] - gradient).max() < 1e-4 * np.abs(gradient).max()


def test_the_loss_equals_that_of_the_plain_hugging_face_model(bench: Bench) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model, rows = model_and_rows(bench, "llama.json", "sdpa", pack_impl="unpacked")
    plain = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    total = 0.0
    for sample in range(12):
        tokens = rows._read(rows.documents_of(sample)[0]).astype(np.int64)
        inside = (np.cumsum(tokens == 7) % 2 == 1) | (tokens == 7)
        opening = (tokens == 8) & (np.cumsum(tokens == 8) % 2 == 1)
        labels = torch.from_numpy(np.where(inside | opening, -100, tokens))[None]
        out = plain(input_ids=torch.from_numpy(tokens)[None], labels=labels)
        total += float(out.loss.detach()) * int((labels[:, 1:] != -100).sum())

    loss = loss_and_gradient(model, rows, list(range(12)), "sdpa")[0]

    assert loss == pytest.approx(total, rel=1e-5)


def test_changing_one_document_changes_no_other_documents_loss(bench: Bench) -> None:
    import torch

    from hpctrain.train.sft.model import to_tensors

    model, rows = model_and_rows(bench, "llama.json", "sdpa")
    batch = rows.micro_batch([0])
    assert batch.document.max() >= 2
    arguments = to_tensors(batch, "sdpa", torch.float32, torch.device("cpu"))
    second = np.flatnonzero(batch.document.reshape(-1)[batch.trained] == 2)
    only_second = {
        **arguments,
        "trained": arguments["trained"][second],
        "labels": arguments["labels"][second],
    }
    before = float(model(**only_second))
    only_second["input_ids"] = torch.where(
        torch.from_numpy(batch.document) == 1, 99, arguments["input_ids"]
    )

    assert float(model(**only_second)) == before
