"""What comes out is what was trained: the same weights, the same token ids, the same dialogue
frame."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import LLAMA, NEOX, Bench, write_indexed

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
PAIRS = [
    ("Open the file", "Atveriet failu"),
    ("Save  all changes?", "Saglabāt visas izmaiņas?"),
    ("Close", "Aizvērt"),
]
TEXT = [f"{en} {number}. {lv}" for number in range(40) for en, lv in PAIRS] + [
    "Ünïcödé ½ ﬁ １２ 漢字 \t tab"
]
KINDS = {
    "bpe": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe nfkc": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "unigram nfkc": {
        "model_type": "unigram",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "hard_vocab_limit": False,
    },
}


def train_spm(directory: Path, kind: str) -> Path:
    """A real model with `<|user|>` at 7 and `<|assistant|>` at 8."""
    prefix = directory / kind.replace(" ", "-")
    control = ["<|endoftext|>", "<c4>", "<c5>", "<c6>", "<|user|>", "<|assistant|>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        vocab_size=380 if "bpe" in kind else 150,
        control_symbols=control,
        minloglevel=2,
        num_threads=1,
        **KINDS[kind],
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("spm")
    return {kind: train_spm(directory, kind) for kind in KINDS}


def span(document: str, sp: Any) -> list[int]:
    return list(sp.encode(document))


@pytest.fixture(scope="module")
def trained(bench: Bench, models: dict[str, Path]) -> Bench:
    """A run that learned three translations by heart (ZeRO 2, bf16), and short ones of other stages
    and families."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(models["bpe"]))
    assert (sp.id_to_piece(7), sp.id_to_piece(8)) == ("<|user|>", "<|assistant|>")
    documents = [[7, *span(en, sp), 7, 8, *span(lv, sp), 8, 3] for en, lv in PAIRS]
    write_indexed(
        bench.path / "pairs", [np.array(document, dtype=np.uint16) for document in documents]
    )
    (bench.path / "wide.json").write_text(
        json.dumps({**LLAMA, "vocab_size": 384, "attention_dropout": 0.0})
    )
    (bench.path / "wide-neox.json").write_text(json.dumps({**NEOX, "vocab_size": 384}))
    keys: dict[str, Any] = {
        "model": "wide.json",
        "train_data_paths": ["pairs"],
        "tokenizer": str(models["bpe"]),
        "eod_id": 3,
        "lr": 1e-2,
        "train_iters": 120,
        "checkpoint_factor": 200,
        "log_interval": 60,
        "train_batch_size": 1,
        "precision": "bf16",
    }
    short = {**keys, "train_iters": 3}
    (bench.path / "left" / "stage3").mkdir(parents=True)
    (bench.path / "left" / "stage3" / "notes.txt").write_text("somebody's")
    orders = [
        bench.order("learned", zero_stage=2, **keys),
        bench.order("stage3", zero_stage=3, export_dir="left/stage3", **short),
        bench.order(
            "neox",
            export_dir="left/neox",
            **{**short, "model": "wide-neox.json", "precision": "fp32"},
        ),
    ]
    again = bench.order(
        "neox-again",
        "resume",
        bench.path / "neox" / "global_step3",
        export_dir="left/again",
        **{**short, "model": "wide-neox.json", "precision": "fp32"},
    )
    narrow = bench.order("narrow", **{**short, "model": "llama.json"})  # 256 embeddings, 380 pieces
    answers = bench.train_many([*orders, again, again, narrow], 1)
    assert answers[:5] == [(0, [])] * 5
    assert answers[5][0] == 2 and "the tokenizer has 380 pieces" in answers[5][1][0]
    run = bench.path / "learned.run"
    (run / "plan.json").write_text(
        json.dumps(
            {
                "guard": {
                    "schema_version": 1,
                    "layout": "deepspeed",
                    "checkpoint_dir": str(bench.path / "learned"),
                },
                "job": {},
                "cost": {},
            }
        )
    )
    return bench


def hpctrain(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def exported(trained: Bench) -> dict[str, Path]:
    """Exports of a run directory (through the command line), of a checkpoint folder, and of one
    checkpoint."""
    from hpctrain.train.core.source import find_source
    from hpctrain.train.sft.export import export

    out = {name: trained.path / f"hf {name}" for name in ("learned", "stage3", "neox")}
    done = hpctrain("export", trained.path / "learned.run", "-o", out["learned"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out['learned']}\n"
    export(find_source(str(trained.path / "stage3")), str(out["stage3"]))
    export(find_source(str(trained.path / "neox/global_step3")), str(out["neox"]))
    return out


@pytest.mark.parametrize("name", ["learned", "stage3", "neox"])
def test_the_exported_model_has_the_logits_of_the_checkpoint(
    trained: Bench, exported: dict[str, Path], name: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hpctrain.train.core.checkpoint import read_weights

    (checkpoint,) = (trained.path / name).glob("global_step*")
    weights = read_weights(str(checkpoint))
    loaded = (
        AutoModelForCausalLM.from_pretrained(exported[name], local_files_only=True).float().eval()
    )
    twin = type(loaded)(loaded.config).eval()
    twin.load_state_dict(
        {
            key: value.to(loaded.dtype if name == "neox" else torch.bfloat16).float()
            for key, value in weights.items()
        }
    )
    ids = torch.arange(40)[None] * 7 % 384

    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, twin(ids).logits)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == sum(
        value.numel() for value in weights.values()
    )


@pytest.mark.parametrize("name", ["stage3", "neox"])
def test_the_model_that_a_finished_run_leaves_is_what_export_makes_of_its_last_checkpoint(
    trained: Bench, exported: dict[str, Path], name: str
) -> None:
    """ZeRO 3 gathers it from all ranks, in the precision that is trained."""
    left, files = (
        trained.path / "left" / name,
        sorted(path.name for path in exported[name].iterdir()),
    )
    assert sorted(path.name for path in left.iterdir()) == files
    for file in (file for file in files if file not in ("hpctrain.json", "model.safetensors")):
        assert (left / file).read_bytes() == (exported[name] / file).read_bytes(), file
    assert tensors(left) == tensors(exported[name])
    about = json.loads((left / "hpctrain.json").read_text())
    assert (about["from"], about["iteration"]) == ("global_step3", 3)


def test_a_run_whose_model_is_gone_writes_it_again_and_no_run_writes_over_what_is_not_its_own(
    trained: Bench,
) -> None:
    left = trained.path / "left"
    assert tensors(left / "again") == tensors(left / "neox")
    # Twice: the second time this very state is there already.
    assert not list(left.glob("set_aside_again*"))
    assert (left / "set_aside_stage3" / "notes.txt").read_text() == "somebody's"


def tensors(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {
        name: value.float().numpy().tobytes()
        for name, value in load_file(str(folder / "model.safetensors")).items()
    }


def test_the_exported_tokenizer_gives_the_training_ids_and_the_dialogue_frame(
    exported: dict[str, Path], models: dict[str, Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported["learned"], local_files_only=True)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(models["bpe"]))
    for text in [*TEXT, " leading", "trailing ", "a\nb\n\n c", "  two  spaces  "]:
        assert tokenizer(text)["input_ids"] == sp.encode(text), text
        assert tokenizer.decode(sp.encode(text)) == sp.decode(sp.encode(text))
    messages = [
        {"role": "user", "content": "Close"},
        {"role": "assistant", "content": "Aizvērt"},
        {"role": "user", "content": "Open"},
    ]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    told = tokenizer.apply_chat_template(messages[:2], return_dict=False)

    frame = [7, *sp.encode("Close"), 7, 8, *sp.encode("Aizvērt"), 8]
    assert asked == [*frame, 7, *sp.encode("Open"), 7, 8]
    assert told == [*frame, 3]
    assert tokenizer.eos_token_id == 3
    assert {path.stat().st_mode & 0o777 for path in exported["learned"].iterdir()} == {0o644}
    config = json.loads((exported["learned"] / "generation_config.json").read_text())
    assert config["eos_token_id"] == [8, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_converted_ids_equal_sentencepiece(models: dict[str, Path], kind: str) -> None:
    from hpctrain.data.spm import load_model
    from hpctrain.train.core.hf_tokenizer import convert

    converted = convert(load_model(str(models[kind])))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(models[kind]))
    letters = sorted(set("".join(TEXT))) + ["é", "Ω", "▁", "\n", "🙂", "\u00a0"]

    @given(
        st.lists(
            st.sampled_from(
                [*letters, *letters, *(word for line in TEXT[:3] for word in line.split())]
            ),
            max_size=12,
        )
    )
    @settings(max_examples=300, deadline=None)
    def check(parts: Sequence[str]) -> None:
        text = "".join(parts)
        assert converted.encode(text).ids == sp.encode(text), repr(text)

    check()
    for text in TEXT:
        assert converted.encode(text).ids == sp.encode(text)


def test_generate_answers_what_was_learned_and_stops_at_the_closing_token(
    trained: Bench, exported: dict[str, Path], models: dict[str, Path]
) -> None:
    from hpctrain.base.errors import UsageError
    from hpctrain.train.core.generate import answer as answer_from
    from hpctrain.train.core.source import find_source

    prompts = [word for en, _ in PAIRS for word in ("-p", en)]
    done = hpctrain("generate", trained.path / "learned.run", *prompts, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)

    assert [reply["text"] for reply in answer["replies"]] == [lv for _, lv in PAIRS]
    assert {reply["stopped_by"] for reply in answer["replies"]} == {"assistant"}
    sp = sentencepiece.SentencePieceProcessor(model_file=str(models["bpe"]))
    assert answer["replies"][0]["prompt_ids"] == [7, *sp.encode(PAIRS[0][0]), 7, 8]

    plain = hpctrain("generate", exported["learned"], "-p", PAIRS[2][0])
    (hot,) = answer_from(
        find_source(str(exported["learned"])), [PAIRS[2][0]], temperature=999.0, max_tokens=90
    )
    assert max(hot.ids) < 380  # the model has 384 embeddings and the tokenizer 380 pieces
    with pytest.raises(UsageError, match="is not UTF-8"):
        answer_from(find_source(str(exported["learned"])), ["a\udce4b"])
    assert plain.stdout == PAIRS[2][1] + "\n"


def test_what_cannot_be_exported_says_why_and_writes_nothing(
    trained: Bench, exported: dict[str, Path]
) -> None:
    again = hpctrain("export", trained.path / "learned", "-o", exported["learned"])
    nothing = hpctrain("export", trained.path, "-o", trained.path / "x")
    absent = hpctrain("export", trained.path / "nowhere", "-o", trained.path / "x")
    twice = hpctrain("export", exported["learned"], "-o", trained.path / "x")

    assert [done.returncode for done in (again, nothing, absent, twice)] == [4, 2, 3, 2]
    (trained.path / "odd").mkdir()
    (trained.path / "odd" / "latest").write_text(".")
    itself = hpctrain("generate", trained.path / "odd", "-p", "x")
    assert itself.returncode == 2 and "`latest` names `.`" in itself.stderr
    here = subprocess.run(
        [sys.executable, "-m", "hpctrain", "export", trained.path / "learned", "-o", ""],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=trained.path / "left",
    )
    assert here.returncode == 4 and (trained.path / "left" / "stage3").is_dir()
    assert "exists" in again.stderr and "NeoX's own converter" in nothing.stderr
    assert not (trained.path / "x").exists() and not list(trained.path.glob(".x*"))
