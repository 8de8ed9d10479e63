"""transformers' Trainer: plain, sharded weights, PEFT, FSDP, DeepSpeed, and without optimizer
states."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from .contract import Leaves, Load, Writer, leaves, without_gaps
from .zero import ENGINE_MODULES, without_shared_memory


def fsdp_on_cpu() -> None:
    """Lets accelerate use FSDP on a CPU: torch can, accelerate's list of devices leaves it out
    (state.py:981-990)."""
    from accelerate import state

    start = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        known = bool(state.AcceleratorState._shared_state)
        start(self, *args, **kwargs)
        if not known and kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = state.DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    if not hasattr(state, "cpu_too"):
        state.AcceleratorState.__init__ = init
        state.cpu_too = True


class _Stop(Exception):
    """Ends a training when everything has been restored and nothing computed yet."""


def tiny_llama(seed: int = 3) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=48, max_position_embeddings=32, **sizes, **heads)
    )


def examples() -> list[dict[str, list[int]]]:
    rows = [[(7 * row + 3 * column) % 48 for column in range(8)] for row in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def random_states() -> dict[str, Any]:
    import random

    import numpy
    import torch

    kept = numpy.random.get_state()[1]
    return {"python": repr(random.getstate()), "numpy": kept, "torch": torch.get_rng_state()}


def set_random_states(seed: int) -> None:
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


class HfTrainer(Writer):
    """`checkpoint-N`, by `Trainer.train` with `save_steps`; loaded by
    `train(resume_from_checkpoint=…)` up to its first step."""

    layout = "hf-trainer"
    preload = (
        *ENGINE_MODULES,
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
        "accelerate",
    )
    says_its_step = ("trainer_state.json",)
    arguments: dict[str, Any] = {}
    slow = True

    def folder(self, step: int) -> str:
        return f"checkpoint-{step}"

    def net(self, seed: int) -> Any:
        return tiny_llama(seed)

    def trainer(self, root: str, max_steps: int, seed: int = 3) -> Any:
        import transformers

        if "fsdp" in self.arguments:
            fsdp_on_cpu()
        args = transformers.TrainingArguments(**self.settings(root, max_steps))
        return transformers.Trainer(self.net(seed), args, train_dataset=examples())

    def settings(self, root: str, max_steps: int) -> dict[str, Any]:
        import transformers

        transformers.logging.set_verbosity_error()
        return {
            "output_dir": root,
            "max_steps": max_steps,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "lr_scheduler_type": "linear",
            "warmup_steps": 3,
            **self.arguments,
        }

    def write(self, root: str, rank: int) -> None:
        self.trainer(root, max(self.steps)).train()

    def reader(self, rank: int) -> Load:
        if self.reloads:
            keep = self.trainer(f"/tmp/unused-{os.getpid()}", max(self.steps) + 2, seed=5)
            initial = {key: value.clone() for key, value in keep.model.state_dict().items()}

        def load(root: str, name: str) -> Leaves:
            if self.reloads:
                trainer = keep
                trainer.model.load_state_dict(initial)
                trainer.optimizer = trainer.lr_scheduler = None
                trainer.state = type(trainer.state)()
            else:
                trainer = self.trainer(f"/tmp/unused-{os.getpid()}", max(self.steps) + 2, seed=5)
            return restored(trainer, os.path.join(root, name), self.optimizer_of)

        return load

    def optimizer_of(self, trainer: Any) -> Any:
        return trainer.optimizer.state_dict()


def restored(trainer: Any, path: str, optimizer_of: Any) -> Leaves:
    """What a Trainer has when it is about to do its first step after a resume."""
    import transformers

    seen: dict[str, Any] = {}

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["step"] = state.global_step
            seen["random"] = random_states()
            raise _Stop

    set_random_states(99)
    look = Look()
    trainer.add_callback(look)
    try:
        trainer.train(resume_from_checkpoint=path)
    except _Stop:
        pass
    finally:
        trainer.remove_callback(look)
    seen["model"] = {key: value for key, value in trainer.model.state_dict().items()}
    seen["optimizer"] = optimizer_of(trainer)
    seen["scheduler"] = trainer.lr_scheduler.state_dict()
    return leaves(seen)


class Plain(HfTrainer):
    name = "hf-plain"


class Shards(HfTrainer):
    name = "hf-shards"

    def net(self, seed: int) -> Any:
        made = super().net(seed)
        made.save_pretrained = partial(made.save_pretrained, max_shard_size="8KB")
        return made


class Peft(HfTrainer):
    name = "hf-peft"
    preload = (*HfTrainer.preload, "peft")

    def net(self, seed: int) -> Any:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        base = tiny_llama()
        made = peft.get_peft_model(base, config)
        import torch

        torch.manual_seed(seed)
        for name, value in made.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(value.data)
        return made


class OnlyModel(HfTrainer):
    """Saved on purpose without what a training needs to go on."""

    name = "hf-save-only-model"
    resumes = False
    arguments = {"save_only_model": True}


class Ddp(HfTrainer):
    name = "hf-ddp-2"
    num_ranks = num_readers = 2
    reloads = False
    arguments = {"ddp_backend": "gloo"}

    def could_be_whole(self, left: set[str]) -> bool:
        """Nothing that the Trainer reads tells how many ranks there were."""
        kinds = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
        return left >= kinds and without_gaps(left, r"rng_state_(\d+)\.pth")


class Fsdp(HfTrainer):
    """FSDP2: DCP folders for the model and the optimizer inside the checkpoint."""

    name = "hf-fsdp2-2"
    num_ranks = num_readers = 2
    reloads = False
    preload = (
        *HfTrainer.preload,
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
    )
    arguments = {
        "fsdp": "full_shard",
        "fsdp_config": {
            "fsdp_version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    }


class FsdpFull(Fsdp):
    """One file for the whole model, as `FULL_STATE_DICT` gathers it."""

    name = "hf-fsdp2-full-2"
    arguments = {
        "fsdp": "full_shard",
        "fsdp_config": {**Fsdp.arguments["fsdp_config"], "state_dict_type": "FULL_STATE_DICT"},
    }


class DeepSpeed(HfTrainer):
    stage = 0
    reloads = False
    preload = HfTrainer.preload

    def get_ready(self) -> None:
        super().get_ready()
        without_shared_memory()

    @property
    def arguments(self) -> dict[str, Any]:  # type: ignore[override]
        config = {
            "zero_optimization": {"stage": self.stage},
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            "torch_adam": True,
        }
        return {"deepspeed": config}

    def optimizer_of(self, trainer: Any) -> Any:
        engine = trainer.model_wrapped
        return {**engine.optimizer.state_dict(), "engine's step": engine.global_steps}


class Zero1(DeepSpeed):
    name = "hf-zero1-2"
    num_ranks = num_readers = 2
    stage = 1


class Zero2(DeepSpeed):
    name = "hf-zero2-2"
    num_ranks = num_readers = 2
    stage = 2


class Zero3(DeepSpeed):
    name = "hf-zero3-2"
    num_ranks = num_readers = 2
    stage = 3


class Sft(HfTrainer):
    """TRL's SFTTrainer: transformers' checkpoint, and its own tokenizer beside the model."""

    name = "trl-sft"
    preload = (*HfTrainer.preload, "trl.trainer.sft_trainer", "datasets")

    def trainer(self, root: str, max_steps: int, seed: int = 3) -> Any:
        import trl
        from datasets import Dataset

        args = trl.SFTConfig(**self.settings(root, max_steps))
        data = Dataset.from_list(examples())
        return trl.SFTTrainer(
            self.net(seed), args, train_dataset=data, processing_class=tiny_tokenizer()
        )


class Dpo(Sft):
    """TRL's DPOTrainer: a reference model that is not saved."""

    name = "trl-dpo"
    preload = (*HfTrainer.preload, "trl.trainer.dpo_trainer", "datasets")

    def trainer(self, root: str, max_steps: int, seed: int = 3) -> Any:
        import trl
        from datasets import Dataset

        args = trl.DPOConfig(**self.settings(root, max_steps))
        rows = [{"prompt": "a b", "chosen": f"c{row}", "rejected": "d"} for row in range(16)]
        return trl.DPOTrainer(
            self.net(seed),
            ref_model=self.net(1),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *"abcd"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


WRITERS = (Plain, Shards, Peft, OnlyModel, Ddp, Fsdp, FsdpFull, Zero1, Zero2, Zero3, Sft, Dpo)
