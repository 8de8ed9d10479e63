"""A run that starts from a model starts from all of it, or says what is wrong with it: nothing is
drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpctrain.base.errors import UsageError

from .conftest import LLAMA, NEOX

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied, one kv head, scaled": {
        **LLAMA,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "rope_scaling": SCALED,
        "rope_parameters": SCALED,
    },
    "neox": NEOX,
    "neox sequential": {
        **NEOX,
        "use_parallel_residual": False,
        "rotary_pct": 0.5,
        "attention_bias": False,
    },
}


def write(folder: Path, config: dict[str, Any], **how: Any) -> Any:
    """A directory with random weights, as transformers writes it."""
    import torch
    import transformers

    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    model.save_pretrained(folder, **how)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_directory_is_in_the_model_that_is_trained(
    tmp_path: Path, name: str
) -> None:
    import torch

    from hpctrain.config.trainers.sft import SftConfig
    from hpctrain.train.dpo import model as dpo
    from hpctrain.train.sft.model import build_model, read_model_config

    folder = str(tmp_path / "model")
    wanted = write(tmp_path / "model", MODELS[name], max_shard_size="20KB").state_dict()
    assert list(tmp_path.glob("model/*-of-*.safetensors"))

    sft = build_model(SftConfig(model=folder), read_model_config(folder), folder, seed=1)
    preference = dpo.read_pretrained(folder, dpo.dpo_model_config(folder, "sdpa"))

    assert (
        type(sft).__mro__[1].__name__ == "SftForward"
        and type(preference).__mro__[1] is dpo.DpoForward
    )
    for found in (sft.state_dict(), preference.state_dict()):
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def test_weights_that_are_missing_torn_or_of_another_shape_are_refused(tmp_path: Path) -> None:
    import torch

    from hpctrain.train.sft.model import read_pretrained

    def refused(name: str) -> str:
        with pytest.raises(UsageError) as error:
            read_pretrained(str(tmp_path / name), torch.float32)
        return str(error.value.problems[0])

    for name in ("layers", "wide", "shards", "cut", "pointer"):
        write(tmp_path / name, LLAMA, max_shard_size="20KB" if name == "shards" else "1GB")
    for name, change in (("layers", {"num_hidden_layers": 3}), ("wide", {"vocab_size": 300})):
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, **change}))
    next((tmp_path / "shards").glob("model-00002-*")).unlink()
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "pointer" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )

    assert "9 tensors are missing, such as model.layers.2." in refused("layers")
    assert "2 tensors have another shape, such as lm_head.weight" in refused("wide")
    for name in ("shards", "cut", "pointer"):
        assert "does not load" in refused(name) and str(tmp_path / name) in refused(name)


@pytest.mark.parametrize(
    "change,why",
    [
        ({"num_attention_heads": 5}, "multiple of the number of attention heads"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads: 3` does not divide"),
        ({"vocab_size": "many"}, "vocab_size"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantised",
        ),
    ],
)
def test_a_config_that_is_no_model_is_refused_before_anything_is_made(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    from hpctrain.train.sft.model import read_model_config

    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))

    with pytest.raises(UsageError, match=why) as error:
        read_model_config(str(tmp_path))
    assert error.value.problems[0].where == str(tmp_path / "config.json")


def test_how_long_a_document_a_model_can_read_counts_the_scaling_that_stretches_it() -> None:
    from transformers import AutoConfig

    from hpctrain.train.sft.model import longest_document

    def limit(**keys: Any) -> int | None:
        return longest_document(AutoConfig.for_model(**{**LLAMA, **keys}))

    assert limit() == 128
    assert limit(rope_scaling={"rope_type": "linear", "factor": 2.0}) == 256
    assert (
        limit(
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        )
        == 128
    )
    assert limit(**{"rope_scaling": SCALED}) == 128
