"""Real TRL on a tiny model: trained, stopped, killed, resumed, merged; nothing quantised,
unfinished or unproved gets through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "dpo"))
import tiny  # noqa: E402

TRAINING = {
    "model_name": "./base",
    "dataset_path": "./pairs.jsonl",
    "precision": "fp32",
    "max_steps": 12,
    "save_steps": 5,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 0,
    "learning_rate": 1e-2,
    "dataset_rows": 40,
    "lora": {"r": 4, "alpha": 8},
}
GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{"
    " m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor"
    " %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Bench:
    """A folder with bases and data, and the orders that one process, which imports torch once,
    carries out in turn."""

    def __init__(self, path: Path):
        self.path = path
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.names: dict[str, int] = {}
        self.answers: list[dict[str, Any]] = []

    def train(
        self,
        name: str,
        mode: str = "scratch",
        checkpoint: str = "",
        link: str = "",
        stage: str = "",
        config: Any = (),
        **more: Any,
    ) -> None:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        path = self.path / f"{name}{link}.yaml"
        path.write_text(json.dumps({**TRAINING, **dict(config)}))  # JSON is YAML
        environment = {
            "HPCTRAIN_MODE": mode,
            "HPCTRAIN_CONFIG": str(path),
            "HPCTRAIN_CHECKPOINT_DIR": str(folder / "ckpt"),
            "HPCTRAIN_CHECKPOINT": str(self.path / checkpoint) if checkpoint else "",
            "HPCTRAIN_RUN_DIR": str(folder),
        }
        if stage:
            environment["HPCTRAIN_STAGE_DIR"] = stage
        self.order(name + link, "train", environment=environment, **more)

    def order(self, name: str, what: str, **arguments: Any) -> None:
        self.names[name] = len(self.orders)
        self.orders.append((what, arguments))

    def carry_out(self) -> None:
        file = self.path / "orders.json"
        file.write_text(json.dumps(self.orders))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "scenarios.py"), str(file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.answers = json.loads(Path(f"{file}.out").read_text())

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.answers[self.names[name]]

    def metrics(self, name: str) -> dict[int, dict[str, Any]]:
        """The last line of each step."""
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return {found["step"]: found for found in map(json.loads, lines)}

    def update(self, checkpoint: str) -> dict[str, Any]:
        return dict(load_file(str(self.path / checkpoint / "adapter_model.safetensors")))


TRL_ROWS = [
    dict(zip(("prompt", "completion"), (row["prompt"], row["chosen"]))) for row in tiny.text_rows(5)
]
DIALOGUES = [
    [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
    * 2
    for row in tiny.text_rows(3)
]
CASES: dict[str, dict[str, Any]] = {
    "text": {
        "rows": [{"text": row["prompt"] + row["completion"]} for row in TRL_ROWS],
        "max_length": 20,
    },
    "prompt and completion": {"rows": TRL_ROWS, "max_length": 1000},
    "truncated": {"rows": TRL_ROWS, "max_length": 12},
    "trained on all of it": {"rows": TRL_ROWS, "max_length": 1000, "completion_only": False},
    "dialogues": {"rows": [{"messages": messages} for messages in DIALOGUES], "max_length": 1000},
    "assistant only": {
        "rows": [{"messages": messages} for messages in DIALOGUES],
        "max_length": 1000,
        "assistant_only": True,
    },
    "prompt and completion of messages": {
        "rows": [{"prompt": messages[:3], "completion": messages[3:]} for messages in DIALOGUES],
        "max_length": 1000,
    },
    "tokenized": {
        "rows": [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}],
        "max_length": 1000,
        "completion_only": True,
    },
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("it's a $(touch canary) dir")
    bench = Bench(path)
    tiny.write_model(path / "base", scale=0.1)
    bf16_like = tiny.write_model(path / "other", seed=1, hidden_size=48, head_dim=12)
    settings = json.loads((bf16_like / "tokenizer_config.json").read_text())
    (bf16_like / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": GENERATION})
    )
    quantised = tiny.write_model(path / "innocent", seed=2)
    (quantised / "config.json").write_text(
        json.dumps({**tiny.CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    packed = tiny.write_model(path / "packed", seed=2)
    weights = dict(load_file(str(packed / "model.safetensors")))
    save_file(
        {**weights, "model.layers.0.mlp.up_proj.weight.absmax": weights["model.norm.weight"]},
        str(packed / "model.safetensors"),
    )
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.text_rows(40)]
    tiny.write_rows(path / "pairs.jsonl", rows)
    tiny.write_rows(path / "bad.jsonl", [rows[0], {"prompt": "x"}, {"question": "y"}, rows[1]])
    tiny.write_model(path / "short", max_position_embeddings=12)
    tiny.write_rows(path / "foreign.jsonl", [{"input_ids": [5, 6, 384], "labels": [5, 6, 384]}])
    stage = path / "node disk" / "mine"

    bench.train("straight", config={"export_dir": "./left/straight"})
    # Asked to leave after two log lines; killed after two more; then left to end, from the newest
    # whole checkpoint.
    bench.train("chain", signal=("USR1", 2))
    bench.train("chain", "resume", "chain/ckpt/NEWEST", link="2", signal=("KILL", 2))
    bench.train("chain", "resume", "chain/ckpt/NEWEST", link="3", stage=str(stage))
    bench.train(
        "chain", "resume", "chain/ckpt/NEWEST", link="4", config={"export_dir": "./left/late"}
    )
    bench.train("whole", config={"lora": None, "max_steps": 2, "learning_rate": 1e-3})
    bench.train(
        "onward",
        "finetune",
        "straight/ckpt/checkpoint-12",
        config={"max_steps": 2, "start": "./straight/ckpt/checkpoint-12"},
    )
    of_whole = {"start": "./whole/ckpt/checkpoint-2", "max_steps": 2, "save_steps": 1}
    bench.train(
        "of whole", "finetune", "whole/ckpt/checkpoint-2", config=of_whole, signal=("USR1", 1)
    )
    bench.train(
        "of whole", "resume", "of whole/ckpt/NEWEST", link="2", config={**of_whole, "max_steps": 4}
    )
    bench.train("bf16", config={"precision": "bf16", "max_steps": 2})
    for name, config in {
        "innocent": {"model_name": "./innocent"},
        "packed": {"model_name": "./packed"},
        "an update": {"model_name": "./straight/ckpt/checkpoint-12"},
        "other rows": {"dataset_rows": 41},
        "bad rows": {"dataset_path": "./bad.jsonl", "dataset_rows": None},
        "another file": {"data_sha256": "0" * 64},
        "no space": {"disk_gib": 1e9},
        "strange argument": {"trainer": {"warmup_step": 3}},
        "no such layer": {"lora": {"target_modules": ["q_projj"]}},
        "short": {"model_name": "./short"},
        "foreign tokens": {"dataset_path": "./foreign.jsonl", "dataset_rows": None},
    }.items():
        bench.train(name, config=config)
    bench.train(
        "other start",
        "finetune",
        "foreign/checkpoint-3",
        config={"start": "./foreign/checkpoint-3"},
    )
    foreign = path / "foreign" / "checkpoint-3"
    foreign.mkdir(parents=True)
    (foreign / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "unsloth/llama-bnb-4bit"})
    )
    for precision in ("fp32", "bf16", "fp16"):
        bench.order(
            f"merged {precision}",
            "export",
            source=str(path / "straight" / "ckpt"),
            directory=str(path / "out" / precision),
            precision=precision,
        )
    bench.order(
        "whole model",
        "export",
        source=str(path / "whole" / "ckpt"),
        directory=str(path / "out" / "whole"),
    )
    bench.order(
        "corrupt",
        "export",
        source=str(path / "straight" / "ckpt"),
        directory=str(path / "out" / "corrupt"),
        corrupt=True,
    )
    bench.order(
        "wrong base",
        "export",
        source=str(path / "straight" / "ckpt"),
        directory=str(path / "out" / "wrong"),
        base=str(path / "innocent"),
    )
    bench.order(
        "other base",
        "export",
        source=str(path / "straight" / "ckpt"),
        directory=str(path / "out" / "other"),
        base=str(path / "other"),
    )
    for name, model in (
        ("validated", "out/fp32"),
        ("validated base", "base"),
        ("validated packed", "packed"),
    ):
        more = {"base": str(path / "base"), "rows": 30} if name == "validated" else {}
        bench.order(
            name, "validate", model=str(path / model), test_set=str(path / "pairs.jsonl"), **more
        )
    bench.order(
        "validated on bad rows",
        "validate",
        model=str(path / "base"),
        test_set=str(path / "bad.jsonl"),
    )
    for bound in (10, 1000):
        argv = [
            "export",
            str(path / "straight" / "ckpt"),
            "-o",
            str(path / "out" / f"below {bound}"),
            "--max-perplexity",
            str(bound),
        ]
        bench.order(
            f"below {bound}", "command", argv=[*argv, "--validate", str(path / "pairs.jsonl")]
        )
    bench.order("no rows", "command", argv=[*argv[:3], str(path / "out" / "no rows"), *argv[4:]])
    bench.order("trl rows", "trl_rows", base=str(path / "other"), cases=list(CASES.values()))
    bench.carry_out()
    return bench


def test_stopped_killed_and_resumed_it_ends_as_if_nothing_had_been(bench: Bench) -> None:
    stopped, killed, last = bench["chain"], bench["chain2"], bench["chain3"]
    assert (bench["straight"]["code"], stopped["code"], killed["code"], last["code"]) == (
        0,
        0,
        -9,
        0,
    ), last["said"]
    assert (
        "stopped by signal USR1: saved at step" in stopped["said"]
        and "done: saved at step 12 of 12" in last["said"]
    )
    assert "tokenizing" in stopped["said"] and "tokenizing" not in last["said"]

    one, two = (bench.update(f"{name}/ckpt/checkpoint-12") for name in ("straight", "chain"))
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    straight, chained = bench.metrics("straight"), bench.metrics("chain")
    assert [chained[step]["loss"] for step in range(1, 13)] == [
        straight[step]["loss"] for step in range(1, 13)
    ]
    assert straight[12]["loss"] < 0.9 * straight[1]["loss"]


def test_staged_data_is_checked_used_and_removed(bench: Bench) -> None:
    assert f"data staged to {bench.path}/node disk/mine" in bench["chain3"]["said"]
    assert list((bench.path / "node disk").iterdir()) == []


def test_all_weights_can_be_trained_and_an_update_be_trained_on(bench: Bench) -> None:
    assert (bench["whole"]["code"], bench["onward"]["code"], bench["bf16"]["code"]) == (0, 0, 0), (
        bench["onward"]["said"]
    )
    assert (bench.path / "whole/ckpt/checkpoint-2/model.safetensors").is_file()
    assert "going on from the update" in bench["onward"]["said"]
    # A whole model that a run started from stays its update's base in every later link.
    assert (bench["of whole"]["code"], bench["of whole2"]["code"]) == (0, 0), bench["of whole2"][
        "said"
    ]
    settings = json.loads(
        (bench.path / "of whole/ckpt/checkpoint-4/adapter_config.json").read_text()
    )
    assert settings["base_model_name_or_path"] == str(bench.path / "whole/ckpt/checkpoint-2")
    assert bench.metrics("onward")[1]["loss"] < 0.9 * bench.metrics("straight")[1]["loss"]
    saved = bench.update("bf16/ckpt/checkpoint-2")
    # the update itself never is
    assert {str(tensor.dtype) for tensor in saved.values()} == {"float32"}


@pytest.mark.parametrize(
    "name, code, words",
    [
        ("innocent", 2, ["the base is quantised", "(bitsandbytes)"]),
        ("packed", 2, ["the base is quantised", "absmax"]),
        ("an update", 2, ["it is an adapter of"]),
        ("other start", 2, ["trained on a quantised base", "unsloth/llama-bnb-4bit"]),
        ("other rows", 2, ["the data has 40 rows, and the run says 41", "dataset_rows: 40"]),
        ("bad rows", 2, ["bad.jsonl:2", "bad.jsonl:3", "has none of the columns"]),
        ("another file", 2, ["not the data that the run names"]),
        ("no space", 3, ["too little space", "`disk_gib`"]),
        ("strange argument", 2, ["no argument `warmup_step`", "did you mean `warmup_steps`?"]),
        ("short", 2, ["the longest row has ", "the base knows 12 positions"]),
        ("foreign tokens", 2, ["the rows hold token 384, and the base has 384 embeddings"]),
        ("no such layer", 2, ["no linear layer `q_projj`", "did you mean `q_proj`?"]),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    name: str, code: int, words: list[str], bench: Bench
) -> None:
    answer = bench[name]
    said = "\n".join(answer["problems"])

    assert answer["code"] == code and all(word in said for word in words), answer
    assert not list((bench.path / name / "ckpt").glob("checkpoint-*"))


@pytest.mark.parametrize("precision, bytes_each", [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_a_merged_model_is_base_and_update_in_logits_and_size(
    precision: str, bytes_each: int, bench: Bench
) -> None:
    answer = bench[f"merged {precision}"]
    proof = answer["answer"]
    base = load_file(str(bench.path / "base" / "model.safetensors"))
    parameters = sum(tensor.size for tensor in base.values())

    assert (proof["parameters"], proof["num_bytes"]) == (parameters, parameters * bytes_each), (
        answer["said"]
    )
    assert proof["difference"] <= {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.002}[precision]
    assert proof["update_effect"] > 0.1 and proof["same_top_token"] > 0.8
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "hpctrain.json",
    } <= set(proof["names"])
    # By our own arithmetic, without torch: W + alpha / r x B A.
    if precision == "fp32":
        merged, update = (
            load_file(str(bench.path / "out/fp32/model.safetensors")),
            bench.update("straight/ckpt/checkpoint-12"),
        )
        at = "model.layers.1.mlp.up_proj"
        change = (
            8
            / 4
            * update[f"base_model.model.{at}.lora_B.weight"]
            @ update[f"base_model.model.{at}.lora_A.weight"]
        )
        assert (
            abs(merged[f"{at}.weight"] - base[f"{at}.weight"] - change).max()
            < 1e-6
            < abs(change).max()
        )


def test_a_finished_run_leaves_its_merged_model_whenever_it_is_asked_to(bench: Bench) -> None:
    said = bench["straight"]["said"]
    # once that is there, no link trains again
    assert said.index("left/straight") < said.index("saved checkpoint-12")
    assert "wrote" in bench["chain4"]["said"] and bench["chain4"]["code"] == 0, bench["chain4"][
        "said"
    ]

    merged = load_file(str(bench.path / "out/fp32/model.safetensors"))
    for name in ("straight", "late"):
        left = load_file(str(bench.path / "left" / name / "model.safetensors"))
        assert left.keys() == merged.keys() and all(
            (left[key] == merged[key]).all() for key in merged
        )
        assert (bench.path / "left" / name / "tokenizer.json").is_file()
    assert not list(bench.path.glob("*/ckpt/.export-*"))


def test_all_trained_weights_are_exported_as_they_are(bench: Bench) -> None:
    proof = bench["whole model"]["answer"]

    assert proof["difference"] == 0 and proof["update_effect"] is None


@pytest.mark.parametrize(
    "name, folder, words",
    [
        ("corrupt", "corrupt", ["is not base + update, and was not kept", "its logits differ"]),
        ("wrong base", "wrong", ["the base is quantised"]),
        ("other base", "other", ["the update was trained on"]),
    ],
)
def test_a_wrong_merge_leaves_nothing_behind(
    name: str, folder: str, words: list[str], bench: Bench
) -> None:
    answer = bench[name]
    said = "\n".join(answer["problems"])

    assert answer["code"] in (1, 2) and all(word in said for word in words), answer
    assert not any(folder in path.name for path in (bench.path / "out").iterdir())


def test_a_merged_model_is_measured_on_held_out_rows_beside_its_base(bench: Bench) -> None:
    """By our own arithmetic: perplexity is e to the mean loss of the tokens that TRL would train,
    `pairs.jsonl`'s completions."""
    merged, base = bench["validated"]["answer"], bench["validated base"]["answer"]
    assert (merged["rows"], base["rows"]) == (30, 40) and 0 < merged["tokens"] < base["tokens"]
    # An untrained model of 384 tokens knows nothing: about 384. Trained on these very rows it is
    # better, and far from 10.
    assert 300 < base["perplexity"] < 500 and 300 < merged["base_perplexity"] < 500
    assert 10 < merged["perplexity"] < merged["base_perplexity"] - 10
    assert "less than 10 is wanted" in merged["faults"][0] and not any(
        "its base" in fault for fault in merged["faults"]
    )
    assert len(merged["replies"]) == 8 and all(reply["prompt"] for reply in merged["replies"])
    assert merged["said"][0].startswith("perplexity ") and "its base's is" in merged["said"][0]


def test_export_measures_what_it_wrote_keeps_it_and_says_so_by_its_exit_code(bench: Bench) -> None:
    for bound in (10, 1000):
        answer = bench[f"below {bound}"]
        said = answer["said"]
        assert "perplexity " in said and ("less than 10 is wanted" in said) == (bound == 10), answer
        # Its replies may be no answers either.
        assert answer["code"] == (1 if "error: " in said else 0) and (
            bound == 1000 or answer["code"] == 1
        )
        assert (bench.path / "out" / f"below {bound}" / "model.safetensors").is_file()
    assert bench["no rows"]["code"] == 2 and "without `--validate`" in bench["no rows"]["said"]


def test_what_cannot_be_measured_is_refused_with_its_place(bench: Bench) -> None:
    assert (
        bench["validated packed"]["code"] == 2
        and "quantised" in bench["validated packed"]["problems"][0]
    )
    bad = bench["validated on bad rows"]
    assert bad["code"] == 2 and [
        problem.split(": ")[1].rsplit("/")[-1] for problem in bad["problems"]
    ] == ["bad.jsonl:2", "bad.jsonl:3"]


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_labels_are_trl_s_own(case: str, bench: Bench) -> None:
    theirs, ours = bench["trl rows"]["answer"][list(CASES).index(case)]

    assert ours == theirs and theirs
