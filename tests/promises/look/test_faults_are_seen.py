"""`check` opens what lies in front of it: runs with everything present but one thing wrong, and the
right ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import checkpoints
import pytest
import yaml
from promises.look.worlds import TALK, World

from hpctrain.plan.check import find_problems
from hpctrain.plan.load import load_plan

RECIPES = "command neox-sft sft hf-sft dpo verl-gad open-instruct-sft open-instruct-dpo".split()


class Fault(NamedTuple):
    """`spoil` makes one thing of a right run wrong; a problem must say `words`, at a line of
    run.yaml that holds `line`."""

    recipe: str
    name: str
    spoil: Callable[[World], object]
    words: str
    line: str


def to(key, value):
    """Sets a key of run.yaml."""
    return lambda world: world.set(key, value)


def config(name, **changes):
    """Lays changes over a model's config.json."""

    def spoil(world):
        path = world.folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def cut(name, keep):
    return lambda world: os.truncate(world.folder / name, keep)


def gone(name):
    return lambda world: os.remove(world.folder / name)


def another_tokenizer(key):
    return lambda world: world.set(key, str(world.folder / "other.model"))


def rows(name, *some):
    return lambda world: world.rows(name, list(some) * 40)


def both(*spoilers):
    def spoil(world):
        for one in spoilers:
            one(world)

    return spoil


PAIRS, ALTERNATING = "config.loss_mask_pairs", "config.loss_mask_alternating_individual"
DATA = "sft_text_document"


def of_indexed_data(recipe: str) -> list[Fault]:
    """Faults of the two recipes that read indexed data."""
    tokenizer = "config.vocab_file" if recipe == "neox-sft" else "recipe_options.tokenizer"
    key = tokenizer.split(".")[1]
    return [
        Fault(recipe, "masks of no token", to(PAIRS, [3, 3]), "marks nothing", "- 3"),
        Fault(recipe, "masks until the reply", to(PAIRS, [7, 8]), "same token", "- 7"),
        Fault(recipe, "replies masked", to(PAIRS, [8, 8]), "masks the replies", "- 8"),
        Fault(recipe, "reply opener of no token", to(ALTERNATING, [5]), "marks nothing", "- 5"),
        Fault(recipe, "reply opener is the user's", to(ALTERNATING, [7]), "user's marker", "- 7"),
        Fault(recipe, "single masks", to("config.loss_mask_individual", [4]), "marks nothing", "4"),
        Fault(
            recipe,
            "short window",
            both(to("config.seq_length", 24), to("config.max_position_embeddings", None))
            if recipe == "sft"
            else to("config.seq_length", 24),
            "are longer than a row of 24",
            "seq_length: 24",
        ),
        Fault(recipe, "286 epochs", to("config.train_iters", 5000), "epochs of its data", "5000"),
        Fault(
            recipe, "another tokenizer", another_tokenizer(tokenizer), "is not the tokenizer", key
        ),
        Fault(
            recipe,
            "data of two tokenizers",
            to("data.train", [f"data/{DATA}", "data/other_text_document"]),
            "made with another tokenizer",
            "data/other",
        ),
        Fault(recipe, "index cut", cut(f"data/{DATA}.idx", 100), "the index of", DATA),
        Fault(recipe, "index of other bytes", cut(f"data/{DATA}.idx", 20), "the index of", DATA),
        Fault(recipe, "tokens cut", cut(f"data/{DATA}.bin", 100), "the .bin has 100", DATA),
        Fault(recipe, "no .bin", gone(f"data/{DATA}.bin"), "is not there", DATA),
        Fault(
            recipe,
            "another's .bin",
            lambda world: world.write(f"data/{DATA}.bin", b"\7\0" * 50),
            "the .bin has 100",
            DATA,
        ),
    ]


def of_models(recipe: str, folder: str, line: str) -> list[Fault]:
    """Faults of a model's folder."""
    weights = f"{folder}/model.safetensors"
    faults = [
        ("weights cut", cut(weights, 30), "is cut short"),
        ("weights empty", cut(weights, 0), "is empty"),
        ("quantised", config(folder, quantization_config={"quant_method": "bnb"}), "is quantised"),
        ("8-bit tensors", lambda world: world.weights(weights, "I8"), "is quantised"),
        ("no config", gone(f"{folder}/config.json"), "config.json"),
        ("few positions", config(folder, max_position_embeddings=16), "positions"),
    ]
    if recipe != "sft":
        faults += [
            ("no weights", gone(weights), "is not whole"),
            ("no tokenizer", gone(f"{folder}/tokenizer.json"), "is not whole"),
            ("half a model", half_model(folder), "is not whole"),
        ]
    lines = {"few positions": "", "weights cut": line}
    return [
        Fault(recipe, f"model: {name}", spoil, words, lines.get(name, line))
        for name, spoil, words in faults
    ]


def half_model(folder):
    def spoil(world):
        os.rename(
            world.folder / folder / "model.safetensors",
            world.folder / folder / "model-00001-of-00002.safetensors",
        )
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        index = json.dumps({"weight_map": shards})
        world.write(f"{folder}/model.safetensors.index.json", index)

    return spoil


def adapter(folder):
    def spoil(world):
        os.remove(world.folder / folder / "config.json")
        about = json.dumps({"base_model_name_or_path": "meta/llama"})
        world.write(f"{folder}/adapter_config.json", about)

    return spoil


def without(*names):
    def spoil(world):
        from promises.look.worlds import INSTALLED

        world.environment(" ".join(one for one in INSTALLED.split() if one not in names))

    return spoil


def start(name="global_step500", tp=1, dp=8, lost=()):
    """A start checkpoint of NeoX's, saved by tp x dp ranks; without some of its files."""

    def spoil(world):
        checkpoints.save(str(world.folder / "base"), 500, tp, dp)
        for file in lost:
            os.remove(world.folder / "base" / name / file)
        world.set("checkpoint.start", f"base/{name}")

    return spoil


def warmup(lost="", ranks=8, step=None):
    """The warmup's folder as an adversarial run's start."""

    def spoil(world):
        for role in ("actor", "critic"):
            for rank in range(ranks):
                for part in ("model", "optim", "extra_state"):
                    file = f"{part}_world_size_{ranks}_rank_{rank}.pt"
                    world.write(f"warm/global_step_4/{role}/{file}", checkpoints.torch_file({}))
            world.write(f"warm/global_step_4/{role}/config.json", "{}")
        world.write("warm/global_step_4/data.pt", checkpoints.torch_file({}))
        world.write("warm/latest_checkpointed_iteration.txt", "4")
        if lost:
            shutil.rmtree(world.folder / "warm/global_step_4" / lost)
        world.in_git("verl", "branch", "-m", "gad")
        world.set("checkpoint.start", "warm")
        world.run["recipe_options"] |= {"stage": "adversarial", "resume_step": step}
        world.set("recipe_options.model", None)

    return spoil


def big(folder, layers=80):
    """Makes a model as wide as Llama-3's 70B, or as its 8B."""
    wide = layers == 80
    return config(
        folder,
        hidden_size=8192 if wide else 4096,
        intermediate_size=28672 if wide else 14336,
        num_hidden_layers=layers,
        num_attention_heads=64 if wide else 32,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def big_neox(world):
    """TildeOpen's 30B, whose optimizer has nothing to be sharded over on one node."""
    world.run["config"] |= {
        "num_layers": 60,
        "hidden_size": 6144,
        "num_attention_heads": 48,
        "num_kv_heads": 8,
        "activation": "swiglu",
        "intermediate_size": 64512,
        "no_weight_tying": True,
        "model_parallel_size": 8,
        "checkpoint_activations": True,
    }


OPTIONS = "recipe_options"
FAULTS = [
    Fault(
        "command",
        "no script",
        to(f"{OPTIONS}.argv", ["python3", "trian.py"]),
        "there is no `trian.py`",
        "trian.py",
    ),
    Fault(
        "command",
        "no program",
        to(f"{OPTIONS}.argv", ["pyhton3", "train.py"]),
        "there is no program `pyhton3`",
        "pyhton3",
    ),
    Fault(
        "command",
        "no program at a path",
        to(f"{OPTIONS}.argv", ["./run", "x"]),
        "there is no `./run`",
        "./run",
    ),
    Fault(
        "command",
        "no module of the package",
        to(f"{OPTIONS}.argv", ["python3", "-m", "pkg.mian"]),
        "there is no module `pkg.mian`",
        "pkg.mian",
    ),
    Fault(
        "command",
        "script behind a launcher",
        to(f"{OPTIONS}.argv", ["bash", "go.sh", "1"]),
        "there is no `go.sh`",
        "go.sh",
    ),
    Fault(
        "command",
        "checkpoints inside a file",
        to("checkpoint.dir", "/etc/passwd/x"),
        "inside the file `/etc/passwd`",
        "dir:",
    ),
    Fault(
        "command", "checkpoints in a file", to("checkpoint.dir", "after.sh"), "is a file", "dir:"
    ),
    Fault(
        "command", "checkpoints in /proc", to("checkpoint.dir", "/proc/x"), "is on no disk", "dir:"
    ),
    Fault(
        "command", "no after_each", to("chain.after_each", "pp.sh"), "is not there", "after_each"
    ),
    Fault("command", "no image", to("container", "x.sif"), "is not there", "container"),
    Fault(
        "command",
        "no working directory",
        to(f"{OPTIONS}.workdir", "cude"),
        "is not there",
        "workdir",
    ),
    *of_indexed_data("neox-sft"),
    Fault(
        "neox-sft",
        "no end of document",
        to("data.train", ["data/bare_text_document"]),
        "end-of-document",
        "data/bare",
    ),
    Fault("neox-sft", "no train.py", gone("neox/train.py"), "is not there", "dir:"),
    Fault(
        "neox-sft", "no deepspeed", without("deepspeed"), "`deepspeed` is not installed", "python"
    ),
    Fault(
        "neox-sft",
        "half a start",
        start(lost=["zero_pp_rank_3_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]),
        "is not complete",
        "start:",
    ),
    Fault(
        "neox-sft", "start of other ranks", start(tp=2, dp=4), "saved by 2 model-parallel", "start:"
    ),
    Fault("neox-sft", "30B on one node", big_neox, "it cannot fit: at least", "nodes"),
    Fault("hf-sft", "70B on one GPU", big("base"), "it cannot fit", "model_name"),
    Fault(
        "dpo",
        "8B without sharding",
        both(big("policy", 32), to("config.dpo_training.fsdp", False)),
        "it cannot fit",
        "policy_name",
    ),
    Fault("sft", "70B on 8 GPUs", big("model"), "it cannot fit", "model: model"),
    Fault("open-instruct-sft", "70B on 8 GPUs", big("base"), "it cannot fit", "model:"),
    Fault("open-instruct-dpo", "70B on 8 GPUs", big("base"), "it cannot fit", "model:"),
    Fault("verl-gad", "235B on 8 GPUs", to(f"{OPTIONS}.size", "235B"), "at least", "size"),
    *of_indexed_data("sft"),
    *of_models("sft", "model", "model: model"),
    Fault(
        "sft",
        "family",
        config("model", model_type="gemma3_text"),
        "family `gemma3_text`",
        "model: model",
    ),
    Fault(
        "sft",
        "small vocabulary",
        config("model", vocab_size=500),
        "vocabulary of 500 is too small",
        "model: model",
    ),
    Fault(
        "sft",
        "no wandb",
        to("config.wandb_project", "x"),
        "`wandb` is not installed",
        "wandb_project",
    ),
    Fault(
        "sft",
        "no flash-attn",
        both(without("flash-attn"), to("config.attention", "flash_attention_2")),
        "`flash-attn` is not installed",
        "attention",
    ),
    *of_models("hf-sft", "base", "model_name"),
    Fault(
        "hf-sft", "adapter as base", adapter("base"), "is an adapter of `meta/llama`", "model_name"
    ),
    Fault(
        "hf-sft",
        "rows without columns",
        rows("rows.jsonl", {"instruction": "a", "output": "b"}),
        "has not the columns",
        "rows.jsonl",
    ),
    Fault(
        "hf-sft",
        "messages without content",
        rows("rows.jsonl", {"messages": [{"role": "user"}]}),
        "`messages` at",
        "rows.jsonl",
    ),
    Fault(
        "hf-sft", "rows miscounted", to("config.dataset_rows", 5000), "the data has 40 rows", "5000"
    ),
    Fault(
        "hf-sft",
        "no JSON",
        lambda w: w.write("rows.jsonl", "hello\nyou\n"),
        "no JSON object",
        "rows.jsonl",
    ),
    Fault("hf-sft", "empty data", lambda w: w.write("rows.jsonl", ""), "is empty", "rows.jsonl"),
    Fault(
        "hf-sft",
        "no chat template",
        lambda w: w.write("base/tokenizer_config.json", "{}"),
        "no chat template",
        "rows.jsonl",
    ),
    Fault(
        "hf-sft",
        "no wandb",
        to("config.wandb_project", "x"),
        "`wandb` is not installed",
        "wandb_project",
    ),
    Fault("hf-sft", "no trl", without("trl"), "`trl` is not installed", "python"),
    Fault(
        "hf-sft",
        "no bitsandbytes",
        to("config.optim", "adamw_bnb_8bit"),
        "`bitsandbytes` is not installed",
        "optim",
    ),
    Fault(
        "hf-sft",
        "no python",
        to(f"{OPTIONS}.python", "pyhton3"),
        "there is no program `pyhton3`",
        "pyhton3",
    ),
    *of_models("dpo", "policy", "policy_name"),
    Fault(
        "dpo",
        "family",
        config("policy", model_type="gemma3_text"),
        "family `gemma3_text`",
        "policy_name",
    ),
    Fault(
        "dpo",
        "no pairs",
        rows("pairs.jsonl", {"messages": TALK}),
        "has not the columns",
        "pairs.jsonl",
    ),
    Fault(
        "dpo",
        "replies of numbers",
        rows("pairs.jsonl", {"prompt": "a", "chosen": 1, "rejected": 2}),
        "`chosen` at",
        "pairs.jsonl",
    ),
    Fault(
        "dpo",
        "no wandb",
        to("config.wandb_project", "x"),
        "`wandb` is not installed",
        "wandb_project",
    ),
    Fault(
        "dpo",
        "split that is not there",
        both(
            lambda w: w.write("saved/dataset_dict.json", '{"splits": ["train"]}'),
            to("data.train", ["saved"]),
            to("config.dataset.split", "tset"),
        ),
        "no split `tset`",
        "tset",
    ),
    Fault(
        "dpo",
        "folder without data",
        both(lambda w: w.write("empty/README.md", ""), to("data.train", ["empty"])),
        "no file to read",
        "empty",
    ),
    *of_models("verl-gad", "student", "model: student"),
    Fault(
        "verl-gad",
        "prompt and response",
        lambda w: w.parquet("train.parquet", [{"prompt": "a", "response": "b"}] * 1000),
        "has not the columns",
        "train.parquet",
    ),
    Fault(
        "verl-gad",
        "content is text",
        lambda w: w.parquet("train.parquet", [{"content": "a", "teacher_response": "b"}] * 1000),
        "column `content`",
        "train.parquet",
    ),
    Fault(
        "verl-gad",
        "no parquet",
        lambda w: w.write("train.parquet", b"PAR1 but not"),
        "no parquet file",
        "train.parquet",
    ),
    Fault("verl-gad", "cut parquet", cut("train.parquet", 200), "cut short", "train.parquet"),
    Fault(
        "verl-gad",
        "validation without content",
        lambda w: w.parquet("val.parquet", [{"x": "a"}]),
        "has not the columns",
        "val.parquet",
    ),
    Fault(
        "verl-gad",
        "records",
        to(f"{OPTIONS}.records", 5000000),
        "the data has 1,000 rows",
        "5000000",
    ),
    Fault(
        "verl-gad",
        "branch",
        lambda w: w.in_git("verl", "branch", "-m", "gad"),
        "is at branch gad",
        "stage",
    ),
    Fault(
        "verl-gad",
        "no git",
        lambda w: os.rename(w.folder / "verl/.git", w.folder / "verl/git"),
        "is no git working copy",
        "verl",
    ),
    Fault("verl-gad", "no vllm", without("vllm"), "`vllm` is not installed", "python"),
    Fault(
        "verl-gad", "no flash-attn", without("flash-attn"), "`flash-attn` is not installed", "size"
    ),
    Fault("verl-gad", "no such step", warmup(step=5), "global_step_5` is not there", "start:"),
    Fault("verl-gad", "start without critic", warmup(lost="critic"), "critic", "start:"),
    Fault("verl-gad", "start of 4 ranks", warmup(ranks=4), "saved by 4 ranks", "start:"),
    *of_models("open-instruct-sft", "base", "model:"),
    Fault(
        "open-instruct-sft",
        "commit",
        to(f"{OPTIONS}.commit", "e6c3044aa6201c8bfa4573c1b03142af599e730d"),
        "and the run needs commit e6c3044",
        "commit",
    ),
    Fault(
        "open-instruct-sft",
        "no messages",
        rows("rows.jsonl", {"prompt": "a", "completion": "b"}),
        "has not the columns",
        "rows.jsonl",
    ),
    Fault(
        "open-instruct-sft",
        "no entrypoint",
        gone("oi/open_instruct/finetune.py"),
        "is not there",
        "dir: oi",
    ),
    Fault(
        "open-instruct-sft",
        "no wandb",
        to("config.with_tracking", True),
        "`wandb` is not installed",
        "with_tracking",
    ),
    Fault(
        "open-instruct-sft",
        "no liger",
        to("config.use_liger_kernel", True),
        "`liger-kernel` is not installed",
        "use_liger",
    ),
    Fault(
        "open-instruct-dpo",
        "no pairs",
        rows("rows.jsonl", {"messages": TALK}),
        "has not the columns",
        "rows.jsonl",
    ),
    Fault(
        "open-instruct-dpo",
        "no deepspeed",
        without("deepspeed"),
        "`deepspeed` is not installed",
        "python",
    ),
]


def checked(world: World, monkeypatch) -> list:
    path = world.save()
    monkeypatch.setenv("PATH", f"{world.folder}/env/bin:/usr/bin:/bin")
    monkeypatch.chdir(world.folder)
    found = find_problems(load_plan(str(path)))
    return [one for one in found if one.level in ("error", "warning")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_right_run_is_passed_in_silence(recipe, tmp_path, monkeypatch):
    assert checked(World(tmp_path, recipe), monkeypatch) == []


def test_a_whole_start_is_passed_in_silence(tmp_path, monkeypatch):
    neox, verl = World(tmp_path / "a", "neox-sft"), World(tmp_path / "b", "verl-gad")
    start()(neox)
    warmup()(verl)

    assert [one for one in checked(neox, monkeypatch) if one.level == "error"] == []
    assert [one for one in checked(verl, monkeypatch) if one.level == "error"] == []


def test_two_stages_cannot_share_one_working_copy_at_two_branches(tmp_path, monkeypatch, cli):
    world = World(tmp_path, "verl-gad")
    world.save()
    world.run["recipe_options"] |= {"stage": "adversarial"}
    world.set("recipe_options.model", None)
    world.set("checkpoint.dir", "adversarial")
    world.set("config.trainer.total_epochs", 4)
    world.set("name", "adv")
    world.write("adv.yaml", yaml.safe_dump(world.run))
    stages = {"a": {"run": "run.yaml"}, "b": {"run": "adv.yaml", "from": "a"}}
    world.write(
        "pipeline.yaml", yaml.safe_dump({"schema_version": 1, "name": "p", "stages": stages})
    )
    code, out, _ = cli("check", tmp_path / "pipeline.yaml", "--json")
    said = [one for one in json.loads(out)["problems"] if "share the working copy" in one["what"]]

    assert code == 1 and said and "worktree add" in said[0]["hint"], out


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.recipe}: {fault.name}")
def test_a_fault_is_named_with_its_place(fault, tmp_path, monkeypatch):
    world = World(tmp_path, fault.recipe)
    fault.spoil(world)
    found = checked(world, monkeypatch)

    said = [one for one in found if fault.words in one.what]
    assert said, found
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    places = [one.where.removeprefix(str(tmp_path / "run.yaml")) for one in said]
    named = [lines[int(place.split(":")[1]) - 1] for place in places if place.count(":") == 2]
    assert any(fault.line in line for line in named), (places, found)
