"""What verl checks late, or not at all with `use_dynamic_bsz`: batches, parallelism, token budgets,
retention, memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hpctrain.config.decision import Decision
from hpctrain.recipes.contract import Context
from hpctrain.recipes.memory import CANNOT, REAL_SIZE
from hpctrain.recipes.rules import Judge, Key, Rule
from hpctrain.recipes.verl.memory import least_ranks, need
from hpctrain.recipes.verl.presets import ModelShape

Where = Callable[[str], str]
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
TRAIN_BATCH, MINI_BATCH = "data.train_batch_size", f"{_ACTOR}.ppo_mini_batch_size"
TENSOR, SAMPLES, KEEP_GPU = (
    f"{_ROLLOUT}.tensor_model_parallel_size",
    f"{_ROLLOUT}.n",
    f"{_ROLLOUT}.gpu_memory_utilization",
)
SEQUENCE = f"{_ACTOR}.ulysses_sequence_parallel_size"
_COUNTS = (
    TRAIN_BATCH,
    MINI_BATCH,
    TENSOR,
    SAMPLES,
    SEQUENCE,
    f"{_ACTOR}.ppo_max_token_len_per_gpu",
    "critic.ppo_max_token_len_per_gpu",
    "data.max_prompt_length",
    "data.max_response_length",
)
LOADS = {"actor": f"{_ACTOR}.checkpoint.load_contents", "critic": "critic.checkpoint.load_contents"}
_PROMPT, _RESPONSE = "data.max_prompt_length", "data.max_response_length"
_MAX_LEN, _BATCHED, _CHUNKED = (
    f"{_ROLLOUT}.max_model_len",
    f"{_ROLLOUT}.max_num_batched_tokens",
    f"{_ROLLOUT}.enable_chunked_prefill",
)
FREE_CACHE = f"{_ROLLOUT}.free_cache_engine"
FORMULA_AT = "docs/recipes/verl-gad.md, Memory"
_DYNAMIC = f"{_ACTOR}.use_dynamic_bsz"
# What verl cuts batches into where it does not do so by tokens: (key without its ending, whether it
# must divide the mini-batch).
_MICRO = (
    (f"{_ACTOR}.ppo_micro_batch_size", True),
    ("critic.ppo_micro_batch_size", True),
    (f"{_ROLLOUT}.log_prob_micro_batch_size", False),
    ("actor_rollout_ref.ref.log_prob_micro_batch_size", False),
)


class Checker(Judge):
    """Collects problems about the overrides `values`; `where` tells the line of a key, or of what
    stands for it."""

    def __init__(
        self,
        values: Mapping[str, Any],
        where: Where,
        ranks: int,
        ranks_per_node: int,
        shape: ModelShape,
    ) -> None:
        super().__init__()
        self.values, self.where = values, where
        self.ranks, self.ranks_per_node, self.shape = ranks, ranks_per_node, shape

    def place(self, key: Key) -> str:
        """Where an override was said."""
        return self.where(str(key))

    def counts_are_numbers(self) -> bool:
        """Whether everything that the arithmetic needs is a whole number above 0; else the rest
        cannot be judged."""
        count = len(self.problems)
        for key in _COUNTS:
            value = self.values.get(key)
            self.check(
                Rule(
                    isinstance(value, bool) or not isinstance(value, int) or value < 1,
                    f"`{key}: {value}` is not a whole number above 0",
                    key,
                )
            )
        for key in ("trainer.save_freq", "trainer.test_freq", "trainer.total_epochs"):
            value = self.values.get(key)
            self.check(
                Rule(
                    isinstance(value, bool) or not isinstance(value, int),
                    f"`{key}: {value}` is not a whole number",
                    key,
                )
            )
        share = self.values.get(KEEP_GPU)
        self.check(
            Rule(
                isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1,
                f"`{KEEP_GPU}: {share}` is not a fraction between 0 and 1",
                KEEP_GPU,
            )
        )
        return len(self.problems) == count

    def batches(self) -> None:
        """train_batch x n over the ranks; mini into train (trainer/ppo/ray_trainer.py
        `_validate_config`, workers)."""
        train, mini, samples = (self.values[key] for key in (TRAIN_BATCH, MINI_BATCH, SAMPLES))
        data_parallel = max(self.ranks // self.values[SEQUENCE], 1)
        self.check(
            Rule(
                train * samples % self.ranks,
                f"{train} prompts x {samples} answers = {train * samples} are no multiple of"
                f" {self.ranks} GPUs",
                TRAIN_BATCH,
                why="verl deals them out evenly and stops otherwise",
                hint=_next_multiple(train, samples, self.ranks, TRAIN_BATCH),
            ),
            (
                Rule(
                    mini > train,
                    f"`ppo_mini_batch_size: {mini}` is more than `train_batch_size: {train}`",
                    MINI_BATCH,
                    why=self._preset(MINI_BATCH),
                    hint=f"set `config.{MINI_BATCH}` to {train} or a divisor of that",
                ),
                Rule(
                    train % mini,
                    f"`ppo_mini_batch_size: {mini}` does not divide `train_batch_size: {train}`",
                    MINI_BATCH,
                    why="the last mini-batch of every step would be smaller, and its gradients too"
                    " large",
                    hint=f"use a divisor of {train}",
                ),
            ),
            Rule(
                mini * samples % data_parallel,
                f"a mini-batch of {mini} prompts x {samples} answers is no multiple of"
                f" {data_parallel} ranks",
                MINI_BATCH,
                why="verl divides it by the ranks and drops the rest (workers/fsdp_workers.py)",
                hint=_next_multiple(mini, samples, data_parallel, MINI_BATCH),
            ),
            Rule(
                samples < 2 and self.values.get("algorithm.adv_estimator") == "grpo",
                f"`rollout.n: {samples}` with `adv_estimator: grpo` gives every answer an advantage"
                " of 0",
                SAMPLES,
                why="GRPO compares the answers to one prompt with each other",
                hint="use 8, as GAD's scripts do",
            ),
        )

    def micro_batches(self) -> None:
        """Without `use_dynamic_bsz` verl needs four more sizes, and says so when Ray holds the GPUs
        already (utils/config.py `validate_config`, workers/config/actor.py,
        workers/fsdp_workers.py)."""
        if self.values.get(_DYNAMIC) is not False:
            return
        mini = (
            self.values[MINI_BATCH]
            * self.values[SAMPLES]
            // max(self.ranks // self.values[SEQUENCE], 1)
        )
        for key, divides in _MICRO:
            each, all_of = self.values.get(f"{key}_per_gpu"), self.values.get(key)
            if each is None and all_of is None:
                self.error(
                    f"`use_dynamic_bsz: false` without `{key}_per_gpu`",
                    _DYNAMIC,
                    why="verl then has nothing to cut batches by, and stops",
                    hint=f"config: {{{key}_per_gpu: 4}}",
                )
            elif each is not None and all_of is not None:
                self.error(
                    f"`{key}` and `{key}_per_gpu` are both set, and verl takes one",
                    f"{key}_per_gpu",
                    hint=f"delete `{key}`",
                )
            elif each is not None and (
                isinstance(each, bool) or not isinstance(each, int) or each < 1
            ):
                self.error(
                    f"`{key}_per_gpu: {each}` is not a whole number above 0", f"{key}_per_gpu"
                )
            elif each is not None and divides and mini % each:
                self.error(
                    f"`{key}_per_gpu: {each}` does not divide the {mini} answers that a GPU has of"
                    " a mini-batch",
                    f"{key}_per_gpu",
                    why="verl asserts it when the models are loaded (workers/fsdp_workers.py)",
                    hint=_divisors(mini, min(mini, 64)),
                )

    def _preset(self, key: str) -> str:
        """Says that a value is the size's, where run.yaml does not set the key itself."""
        of_size = self.where(key) == self.where("recipe_options.size")
        return f"{self.values[key]} comes with `recipe_options.size`" if of_size else ""

    def parallelism(self) -> None:
        """The rollout's tensor parallelism against GPUs and heads; sequence parallelism against
        heads."""
        tensor, sequence, shape = self.values[TENSOR], self.values[SEQUENCE], self.shape
        if tensor > self.ranks_per_node or self.ranks % tensor:
            limit = f"{self.ranks_per_node} GPUs a node, {self.ranks} in all"
            self.error(
                f"`tensor_model_parallel_size: {tensor}` does not divide the GPUs",
                TENSOR,
                why=limit,
                hint="use a power of 2 up to the GPUs of a node",
            )
        self.check(
            (
                Rule(
                    shape.heads % tensor,
                    f"`tensor_model_parallel_size: {tensor}` does not divide the model's"
                    f" {shape.heads}"
                    " heads",
                    TENSOR,
                    why="vLLM gives every GPU the same number of heads",
                    hint=_divisors(shape.heads, self.ranks_per_node),
                ),
                Rule(
                    tensor % shape.kv_heads and shape.kv_heads % tensor,
                    f"`tensor_model_parallel_size: {tensor}` does not fit the model's"
                    f" {shape.kv_heads}"
                    " key-value heads",
                    TENSOR,
                    hint=_divisors(shape.kv_heads, self.ranks_per_node),
                ),
            ),
            Rule(
                shape.heads % sequence or self.ranks % sequence,
                f"`ulysses_sequence_parallel_size: {sequence}` does not divide {shape.heads} heads"
                f" and {self.ranks} GPUs",
                SEQUENCE,
                hint="use 1, 2 or 4",
            ),
        )

    def token_budgets(self) -> None:
        """The longest sequence must fit into one forward pass of the actor and of the critic."""
        longest = self.values["data.max_prompt_length"] + self.values["data.max_response_length"]
        for key, sequence in (
            (f"{_ACTOR}.ppo_max_token_len_per_gpu", self.values[SEQUENCE]),
            (
                "critic.ppo_max_token_len_per_gpu",
                self.values.get("critic.ulysses_sequence_parallel_size", 1),
            ),
        ):
            budget = self.values[key]
            if isinstance(sequence, int) and budget * sequence < longest:
                self.error(
                    f"`{key}: {budget}` is less than the longest sequence",
                    key,
                    why=(
                        f"max_prompt_length + max_response_length = {longest}; verl stops at the"
                        " first that long"
                    ),
                    hint=f"at least {-(-longest // sequence)}",
                )

    def context_length(self, positions: int, limit: str) -> None:
        """Prompt and answer must fit into what the student knows, and into what vLLM is told (verl
        workers/rollout/vllm_rollout: an assertion once the GPUs are held). `limit` says where
        `positions` is set.
        """
        longest = self.values["data.max_prompt_length"] + self.values["data.max_response_length"]
        said = (
            f"max_prompt_length {self.values['data.max_prompt_length']} + max_response_length"
            f" {self.values['data.max_response_length']}"
        )
        at = next(filter(lambda key: not self._preset(key), (_RESPONSE, _PROMPT)), _RESPONSE)
        self.check(
            Rule(
                longest > positions,
                f"{said} = {longest}, and the model knows {positions} positions",
                at,
                why=limit,
                hint=f"at most {positions} together; verl stops when it loads the model",
            )
        )
        told = self.values.get(_MAX_LEN)
        if isinstance(told, int) and not isinstance(told, bool):
            self.check(
                (
                    Rule(
                        told < longest,
                        f"`rollout.max_model_len: {told}` is less than {said} = {longest}",
                        _MAX_LEN,
                        why="vLLM would refuse the longest prompts",
                        hint="delete it: verl then takes the sum",
                    ),
                    Rule(
                        told > positions,
                        f"`rollout.max_model_len: {told}` is more than the {positions} positions"
                        " that"
                        " the model knows",
                        _MAX_LEN,
                        why=limit,
                        hint=f"at most {positions}, or delete it",
                    ),
                )
            )
        batched = self.values.get(_BATCHED, 8192)
        self.check(
            Rule(
                self.values.get(_CHUNKED) is not False
                and isinstance(batched, int)
                and batched < longest,
                f"`rollout.max_num_batched_tokens: {batched}` is less than {said} = {longest}",
                _BATCHED if _BATCHED in self.values else at,
                level="warning",
                why=("" if _BATCHED in self.values else "8192 is verl's default; ")
                + "verl up to 0.5 refuses that with chunked prefill",
                hint=f"config.{_BATCHED}: {longest}",
            )
        )

    def saving(self) -> None:
        """Checkpoints that come, stay, and are whole."""
        keep = [
            (key, self.values.get(f"trainer.{key}"))
            for key in ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep")
        ]
        self.check(
            (
                Rule(
                    keep[0][1] != keep[1][1],
                    f"`{keep[0][0]}: {keep[0][1]}` and `{keep[1][0]}: {keep[1][1]}` leave halves of"
                    " checkpoints",
                    f"trainer.{keep[0][0]}",
                    hint="give both the same number, or delete both",
                ),
                Rule(
                    isinstance(keep[0][1], int) and keep[0][1] < 2,
                    f"`{keep[0][0]}: {keep[0][1]}` deletes the only complete checkpoint before"
                    " the next"
                    " is written",
                    f"trainer.{keep[0][0]}",
                    why="verl removes the old ones first (fsdp_checkpoint_manager.py)",
                    hint="keep at least 2, or delete both keys",
                ),
            ),
            Rule(
                self.values["trainer.save_freq"] < 1,
                f"`trainer.save_freq: {self.values['trainer.save_freq']}` saves nothing before"
                " the end",
                "trainer.save_freq",
                hint="save every 100 steps or so",
            ),
            Rule(
                self.values.get("trainer.del_local_ckpt_after_load") is True,
                "`trainer.del_local_ckpt_after_load: true` may delete the checkpoint that the run"
                " goes on from",
                "trainer.del_local_ckpt_after_load",
                hint="delete it",
            ),
        )
        for key, value in self.values.items():
            if key.endswith(("checkpoint.contents", "checkpoint.save_contents")) and isinstance(
                value, list
            ):
                lacking = [part for part in ("model", "optimizer", "extra") if part not in value]
                self.check(
                    Rule(
                        lacking,
                        f"`{key}` without {', '.join(lacking)}: no run can go on from such"
                        " checkpoints",
                        key,
                        hint="[model, optimizer, extra], with hf_model if you like",
                    )
                )
        for key in LOADS.values():
            lacking = [
                part
                for part in ("model", "optimizer", "extra")
                if part not in _loads(self.values, key)
            ]
            self.check(
                (
                    Rule(
                        "model" in lacking,
                        f"`{key}` without model: every link begins with the weights of the first",
                        key,
                        hint="[model, optimizer, extra]",
                    ),
                    Rule(
                        lacking,
                        f"`{key}` without {', '.join(lacking)}: not only the start, every link"
                        " begins"
                        " without",
                        key,
                        why="verl reads the key whenever it loads a checkpoint",
                        hint="delete the key",
                        level="warning",
                    ),
                )
            )


def start_takes(values: Mapping[str, Any]) -> str:
    """What verl takes from a checkpoint it starts from, in the guard's words: all that
    `load_contents` names, for the actor and the critic each, and `data.pt`
    (verl/trainer/ppo/ray_trainer.py `_load_checkpoint`)."""
    fresh = [role for role, key in LOADS.items() if "optimizer" not in _loads(values, key)]
    if len(fresh) == len(LOADS):
        optimizers = "without its optimizers, with"
    elif fresh:
        optimizers = f"without the {fresh[0]}'s optimizer, with the other and"
    else:
        optimizers = "with its optimizers and"
    return f"{optimizers} its place in the data, and counts on from its step"


def _loads(values: Mapping[str, Any], key: str) -> list[Any]:
    """What is loaded: by default what is saved, which is everything."""
    found = values.get(key)
    return found if isinstance(found, list) else ["model", "optimizer", "extra"]


def check_memory(checker: Checker, context: Context) -> tuple[Decision, ...]:
    """Refuses what cannot fit, by a lower bound; says how many GPUs it would take. A peak that was
    measured, `estimate.memory_gib`, says otherwise."""
    nominal, measured = context.node_type.gpu_memory_gib, context.spec.memory_gib
    values, where = checker.values, checker.where("recipe_options.size")
    budget = max(
        values[f"{_ACTOR}.ppo_max_token_len_per_gpu"], values["critic.ppo_max_token_len_per_gpu"]
    )
    tokens = min(budget, values[_PROMPT] + values[_RESPONSE])
    per_node, tensor = checker.ranks_per_node, values[TENSOR]
    least = need(checker.shape, values, checker.ranks, per_node, tensor, tokens)
    reason = f"{least.words}; a lower bound ({FORMULA_AT})"
    if not nominal:
        reason += "; not compared: the site's profile has no `gpu_memory_gib`"
    decision = Decision("memory.gpu_gib_least", round(least.total, 1), reason, where)
    if not context.gpus_per_node or not nominal:
        return (decision,)
    gpu_gib, share = nominal * REAL_SIZE, float(values[KEEP_GPU])
    if max(least.total, measured or 0) > gpu_gib and (measured is None or measured > gpu_gib):
        ranks = least_ranks(checker.shape, values, gpu_gib, per_node, tensor, tokens)
        hint = (
            f"it could fit on {ranks} such GPUs ({ranks // per_node} nodes)"
            if ranks
            else f"no number of such GPUs is enough with `tensor_model_parallel_size: {tensor}`"
        )
        offload = "`param_offload` and `optimizer_offload` of the actor and the critic take less"
        site = context.site.document.where("node_types", context.node_type.name, "gpu_memory_gib")
        checker.error(
            f"{CANNOT}: the models need at least {max(least.total, measured or 0):.0f} GiB of each GPU, and"
            f" those of `{context.node_type.name}` nodes give {gpu_gib:.1f}",
            "recipe_options.size",
            why=f"{least.words}; formula and sources in {FORMULA_AT}; GPU memory set in {site}",
            hint=f"{hint}; {offload}",
        )
    elif least.rollout > share * gpu_gib:
        checker.error(
            f"`gpu_memory_utilization: {share:g}` gives vLLM {share * gpu_gib:.0f} GiB, and the"
            f" weights alone take {least.rollout:.0f}",
            KEEP_GPU,
            hint="more tensor parallelism, or a larger share",
        )
    elif values.get(FREE_CACHE) is False and least.later > (1 - share) * gpu_gib:
        checker.error(
            f"`free_cache_engine: false` leaves vLLM {share:.0%} of each GPU's {gpu_gib:.0f} GiB, and"
            f" training needs {least.later:.0f} GiB more",
            FREE_CACHE,
            why=f"{least.words}; vLLM then keeps its cache while the models train",
            level="warning",
            hint=(
                "set `free_cache_engine: true`, a smaller `gpu_memory_utilization`, or take more"
                " GPUs"
            ),
        )
    memory_gib = context.node_type.memory_gib
    checker.check(
        Rule(
            least.host > memory_gib,
            f"what is offloaded needs {least.host:.0f} GiB of each node's memory, and it has"
            f" {memory_gib:g}",
            f"{_ACTOR}.fsdp_config.param_offload",
            hint="take more nodes, or offload less",
        )
    )
    return (decision,)


def misnamed(model: str, where: str) -> Rule:
    """Against a model that does not exist, by its name."""
    return Rule(
        re.search(r"qwen2\.5-235b", model, re.IGNORECASE),
        "there is no Qwen2.5-235B",
        where,
        why="Qwen's model of 235 billion parameters is Qwen3-235B-A22B",
        hint="name the folder of Qwen3-235B-A22B",
    )


def _next_multiple(prompts: int, samples: int, ranks: int, key: str) -> str:
    up = next(
        count for count in range(prompts, prompts + ranks + 1) if count * samples % ranks == 0
    )
    down = next((count for count in range(prompts, 0, -1) if count * samples % ranks == 0), None)
    return f"`config.{key}`: {down} or {up}" if down else f"`config.{key}`: {up}"


def _divisors(number: int, limit: int) -> str:
    return "one of " + ", ".join(str(count) for count in range(1, limit + 1) if number % count == 0)
