"""The DPO trainer: set up, the cached reference, and what a step, a report and a checkpoint are;
when, is `core.loop`'s."""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
from typing import Any

import numpy as np
import torch

from hpctrain.base import errors
from hpctrain.config.trainers.dpo import DpoConfig
from hpctrain.config.trainers.sft import learning_rate
from hpctrain.train.core import checkpoint as whole
from hpctrain.train.core import ranks
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.core.logs import Metrics
from hpctrain.train.core.loop import Cadence, StepLoop
from hpctrain.train.dpo import checkpoint, export, parallel, reference
from hpctrain.train.dpo.batches import Rows, Slots, lay_out, plan_epoch, rank_slots, steps_per_epoch
from hpctrain.train.dpo.loss import dpo_loss
from hpctrain.train.dpo.margins import Gatherer, Interval, MarginLog
from hpctrain.train.dpo.model import can_share_prompt, dpo_model_config, read_pretrained, to_tensors
from hpctrain.train.dpo.pairs import load_pairs, make_pairs
from hpctrain.train.sft.model import choose_attention, has_weights

WORTH_SHARING = 0.1  # of all tokens; below it the mask costs about what the shared prompt saves


@dataclasses.dataclass(frozen=True)
class DpoMetrics(Metrics):
    """One log interval over all ranks, with what DPO adds. `loss` is per pair."""

    rewards_chosen: float
    rewards_rejected: float
    margin: float
    accuracy: float
    memory_gib: tuple[float, ...]


class DpoTrainer(StepLoop):
    """One rank of one link. Raises UsageError, Refused or EnvironmentFault while setting up; see
    `run` for the rest."""

    tag = checkpoint.STEP

    def __init__(self, config: DpoConfig, launch: Launch):
        self.config, self.values = config, config.training
        cadence = Cadence(
            self.values["log_steps"],
            self.values["save_steps"],
            self.values["keep_last_n_checkpoints"],
            self.values["max_skipped_in_a_row"],
            self.values["stop_signal"],
        )
        super().__init__(launch, cadence, config.wandb_project)
        self.export_to = os.path.join(config.mount_dir or launch.run_dir, "dpo_model")
        self.device = ranks.join(launch, self.values["distributed_timeout_s"])
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.margins: MarginLog | None = None
        self.skipped = self.num_nan = 0

        self.start = launch.checkpoint if launch.mode == "finetune" else config.policy_name
        self.attention = choose_attention(self.values["attention"])
        self.model_config = dpo_model_config(config.policy_name, self.attention)
        self._check_start()
        ranks.on_first(launch.rank, lambda: whole.check_writable(launch.checkpoint_dir))
        path = ranks.on_first(
            launch.rank, lambda: make_pairs(config, launch.checkpoint_dir, self.say)
        )
        self.pairs = load_pairs(path, config)
        self._check_fit()
        self.batch = config.train_batch_size(launch.num_ranks)
        self.per_epoch = steps_per_epoch(len(self.pairs), self.batch)
        self.num_steps = self.values["max_steps"] or math.ceil(
            self.values["epochs"] * self.per_epoch
        )
        self.shared = self._share(self.model_config)
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

        self.reference = config.ref_name or self.start
        weights = reference.weights_fingerprint(self.reference, launch.rank, launch.num_ranks)
        self.progress = checkpoint.Progress(
            run_id=uuid.uuid4().hex,
            iteration=0,
            consumed_samples=0,
            num_ranks=launch.num_ranks,
            train_batch_size=self.batch,
            precision=config.precision,
            seed=self.values["seed"],
            data_fingerprint=ranks.on_first(launch.rank, self.pairs.fingerprint),
            reference_key="",
            config=config.as_dict(),
        )
        key = reference.cache_key(self.progress.data_fingerprint, weights, config.precision)
        self.progress = dataclasses.replace(self.progress, reference_key=key)
        self.resumed = (
            checkpoint.check_resume(launch.checkpoint, self.progress)
            if launch.mode == "resume"
            else None
        )
        self.run_id = ranks.on_first(launch.rank, lambda: self.progress.run_id)
        self.cache = reference.ReferenceCache(
            self.values["reference_cache"] or launch.checkpoint_dir, key, len(self.pairs)
        )
        if self.cache.damaged:
            self.say(
                f"warning: {self.cache.path} is damaged ({self.cache.damaged}) and is computed"
                " again"
            )
        self._say_setup()

    def run(self, stop: StopRequest) -> int:
        """Cache the reference, then train; see `StepLoop.run_steps`."""
        model = self._cached_reference(stop)
        if model is None:
            self.say(
                f"stopped by signal {self.values['stop_signal']} while caching reference logprobs:"
                " kept, exit 0"
            )
            return errors.DONE
        self._place_policy(model)
        self.interval = Gatherer(self.batch, self.device)
        return self.run_steps(stop)

    def open_logs(self) -> None:
        """The margin files besides."""
        super().open_logs()
        if self.launch.rank == 0:
            self.margins = MarginLog(self.launch.run_dir)

    def begin_step(self, stopping: bool) -> bool:
        """Whether any rank wants to stop."""
        vote = torch.tensor([int(stopping)], device=self.device)
        return bool(ranks.sum_over_ranks(vote).item())

    def close(self) -> None:
        """Flush the logs, copy them to `mount_dir`, and leave the other ranks."""
        if self.log is not None and self.margins is not None:
            self.log.close()
            self.margins.close()
            if self.config.mount_dir:
                export.copy_logs(self.launch.run_dir, self.config.mount_dir)
        ranks.finish()

    def step(self, number: int) -> bool:
        """One optimizer step; whether it was skipped for want of a finite gradient.

        The gradient is that of the mean loss over the whole batch, however it is spread over ranks
        and passes.
        """
        epoch, at = divmod(number - 1, self.per_epoch)
        numbers = self._epoch(epoch)[at]
        torch.manual_seed(self.values["seed"] * 1_000_003 + number)
        lr = learning_rate(self.config.schedule, number, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        table = self.interval.new_table()
        passes = rank_slots(
            numbers, self.launch.rank, self.launch.num_ranks, self.values["batch_size"]
        )
        tokens = 0
        for turn, slots in enumerate(passes, 1):
            rows = lay_out(
                [self.pairs[pair] for pair in slots.pairs],
                self.shared,
                8 if self.device.type == "cuda" else 1,
            )
            tokens += rows.num_tokens
            parallel.hold_gradients(self.model, self.config, turn == len(passes))
            # FSDP averages over ranks what is to be a sum.
            loss = self._loss(rows, slots, table) * (self.launch.num_ranks / len(numbers))
            loss.backward()
        norm = parallel.clip(self.model, self.values["gradient_clipping"])
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self.interval.add(table, epoch, number, len(numbers), tokens, norm, lr)
        consumed = self.progress.consumed_samples + len(numbers)
        self.progress = dataclasses.replace(
            self.progress, iteration=number, consumed_samples=consumed
        )
        return not finite

    def _loss(self, rows: Rows, slots: Slots, table: torch.Tensor) -> torch.Tensor:
        """The summed loss of a forward pass; per pair results go to their places in `table`."""
        logps = self.model(**to_tensors(rows, self.dtype, self.device))
        chosen, rejected = logps.chunk(2)
        cached = torch.from_numpy(self.cache.values[list(slots.pairs)]).to(self.device)
        sizes = None
        if self.values["loss_type"] == "sigmoid_norm":
            pairs = [self.pairs[pair] for pair in slots.pairs]
            sizes = (
                torch.tensor([len(pair.chosen) for pair in pairs], device=self.device),
                torch.tensor([len(pair.rejected) for pair in pairs], device=self.device),
            )
        losses, won, lost = dpo_loss(
            chosen,
            rejected,
            cached[:, 0],
            cached[:, 1],
            self.values["beta"],
            self.values["label_smoothing"],
            sizes,
        )
        counts = torch.tensor(slots.counts, device=self.device)
        places = torch.tensor(
            [place for place, count in zip(slots.places, slots.counts) if count], device=self.device
        )
        table.index_copy_(0, places.long(), torch.stack([losses.detach(), won, lost], 1)[counts])
        return torch.where(counts, losses, 0.0).sum()

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        if self._plan[0] != epoch:
            self._plan = (
                epoch,
                plan_epoch(self.pairs.lengths, self.batch, self.values["seed"], epoch),
            )
        return self._plan[1]

    def _cached_reference(self, stop: StopRequest) -> Any:
        """The policy's model if it was the reference too, else True; None when stopped before the
        cache was complete."""
        if self.cache.complete:
            return True
        model_config = (
            dpo_model_config(self.reference, self.attention)
            if self._is_model(self.reference)
            else self.model_config
        )
        model = self._placed(self.reference, model_config)
        finished = reference.fill(
            self.cache,
            model,
            self.pairs,
            self.values["batch_size"],
            self._share(model_config),
            self.dtype,
            self.device,
            lambda: stop.received,
            self.say,
        )
        parallel.reshard(model)
        if not finished:
            return None
        return model if self.reference == self.start and self.resumed is None else True

    def _place_policy(self, model: Any) -> None:
        """The model to train and its optimizer, with all that the checkpoint holds when this is a
        resume."""
        if self.resumed is None:
            self.model = self._placed(self.start, self.model_config) if model is True else model
        else:
            self.model = parallel.place(
                self.model_config, self.config, self.device, None, self.launch.rank
            )
        self.optimizer = parallel.make_optimizer(self.model, self.config)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.progress = dataclasses.replace(self.progress, run_id=self.run_id)
        if self.resumed is not None:
            checkpoint.load(self.model, self.optimizer, self.launch.checkpoint)
            self.go_on_from(
                self.resumed,
                self.resumed.config["dpo_training"],
                self.progress.config["dpo_training"],
            )

    def _placed(self, source: str, model_config: Any) -> Any:
        """A model with the weights of a Hugging Face directory, a checkpoint of this trainer, or
        one of the SFT trainer."""
        if has_weights(source):

            def read() -> Any:
                return read_pretrained(source, model_config).state_dict()

        elif os.path.isfile(os.path.join(source, ".metadata")):
            model = parallel.place(model_config, self.config, self.device, None, self.launch.rank)
            checkpoint.load(model, None, source)
            return model
        else:

            def read() -> Any:
                return whole.read_weights(source)

        return parallel.place(model_config, self.config, self.device, read, self.launch.rank)

    @staticmethod
    def _is_model(folder: str) -> bool:
        return os.path.isfile(os.path.join(folder, "config.json"))

    def _share(self, model_config: Any) -> bool:
        wanted = self.values["share_prompt"]
        able = can_share_prompt(model_config, self.attention)
        if wanted == "always" and not able:
            raise errors.UsageError(
                f"`share_prompt: always` does not work with attention {self.attention}"
                " or a model that has windows of its own",
                hint="use auto",
            )
        return (
            able
            and wanted != "never"
            and (wanted == "always" or self.pairs.saved_by_sharing > WORTH_SHARING)
        )

    def _check_start(self) -> None:
        """Raises UsageError when what the run starts from is another model than the policy.

        The reference has the start's config and the policy its own: they would not be the same
        function of the weights.
        """
        start = self.launch.checkpoint
        if start and self._is_model(start):
            then = dpo_model_config(start, self.attention).to_dict()
            other = whole.model_differences(then, self.model_config.to_dict())
            if other:
                raise errors.UsageError(
                    f"the start is another model than `policy_name`: {', '.join(other)}",
                    where=start,
                    why=f"the other is {self.config.policy_name}",
                    hint="set `policy_name` to the model that the start was made from",
                )

    def _check_fit(self) -> None:
        limit = getattr(self.model_config, "max_position_embeddings", None)
        longest = max(map(int, self.pairs.reply_lengths))
        if limit and longest > limit:
            raise errors.UsageError(
                f"a prompt with its reply has {longest} tokens, and the model knows {limit}"
                " positions",
                where=self.launch.config,
                hint=f"set dataset.max_len to at most {limit}",
            )
        if self.pairs.largest_token >= self.model_config.vocab_size:
            raise errors.UsageError(
                f"the tokenizer gives token {self.pairs.largest_token}, and the model has"
                f" {self.model_config.vocab_size}",
                where=self.config.policy_name,
                hint="the directory's tokenizer belongs to another model",
            )

    def _say_setup(self) -> None:
        pairs, values = self.pairs, self.values
        origin = (
            self.launch.checkpoint if self.launch.mode != "scratch" else self.config.policy_name
        )
        self.say(f"mode {self.launch.mode}: starts from {origin}; reference {self.reference}")
        share = ", prompts computed once for both replies" if self.shared else ""
        ways = (
            "sharded (FSDP2)"
            if values["fsdp"] and self.launch.num_ranks > 1
            else "a whole copy on each rank"
        )
        self.say(
            f"model {self.model_config.model_type}, {self.config.precision}, attention"
            f" {self.attention}{share}, {ways}, {self.launch.num_ranks} ranks on {self.device.type}"
        )
        if values["fsdp"] and self.launch.num_ranks == 1:
            self.say(
                "warning: `fsdp: true` with one process shards nothing; start one process per GPU"
                " (torchrun, srun)"
            )
        self.say(
            f"data {len(pairs):,} pairs, {pairs.num_tokens:,} tokens; {pairs.truncated:,} truncated"
            f" to {pairs.max_len} tokens, {pairs.dropped:,} dropped since their prompt leaves no"
            " room for a reply"
        )
        self.say(
            f"batch {self.batch} = {values['batch_size']} x {values['gradient_accumulation_steps']}"
            f" accumulation x {self.launch.num_ranks} ranks; {self.num_steps} iterations ="
            f" {self.num_steps / self.per_epoch:.2f} epochs of {self.per_epoch}"
        )

    def write_checkpoint(self) -> str:
        """DCP's shards, and the model's config."""
        return checkpoint.save(
            self.model,
            self.optimizer,
            self.launch.checkpoint_dir,
            self.progress,
            self.model_config.to_dict(),
            ranks.barrier,
            self.launch.rank,
        )

    def all_weights(self) -> dict[str, Any]:
        """All weights by name on the CPU of rank 0; empty on the others."""
        return parallel.full_weights(self.model)

    def write_model(self, target: str, weights: dict[str, Any]) -> None:
        """The trained model with the policy's tokenizer."""
        about = {
            "run_id": self.progress.run_id,
            "iteration": self.progress.iteration,
            "trainer": "hpctrain.train.dpo",
        }
        export.write_model(
            target,
            weights,
            self.model_config,
            self.config.policy_name,
            self.config.precision,
            about,
        )

    def before_save(self) -> None:
        """The margins up to a checkpoint are on the disk before it is."""
        self.report()

    def report(self) -> None:
        """One log line, and the margin files."""
        if not len(self.interval):
            return
        interval = self.interval.close()
        self.num_nan += interval.num_nan
        if self.log is not None and self.margins is not None:
            self.margins.write(interval)
            self.log.write(*self._metrics(interval))

    def _metrics(self, interval: Interval) -> tuple[DpoMetrics, str]:
        last, steps = interval.batches[-1], len(interval.batches)
        pairs = sum(len(batch.losses) for batch in interval.batches)
        per_gpu = interval.tokens / interval.seconds / self.launch.num_ranks
        metrics = DpoMetrics(
            iteration=last.step,
            train_iters=self.num_steps,
            loss=interval.mean("losses"),
            lr=last.lr,
            grad_norm=last.grad_norm,
            step_time_s=interval.seconds / steps,
            samples_per_s=pairs / interval.seconds,
            tokens_per_s_per_gpu=per_gpu,
            # 6 floating point operations per parameter and token, forward and backward (arXiv
            # 2001.08361 §2.1).
            tflops_per_gpu=6 * self.num_parameters * per_gpu / 1e12,
            trained_tokens=interval.tokens,
            consumed_samples=self.progress.consumed_samples,
            epoch=last.step / self.per_epoch,
            skipped=self.skipped,
            nan=self.num_nan,
            rewards_chosen=interval.mean("chosen_rewards"),
            rewards_rejected=interval.mean("rejected_rewards"),
            margin=interval.mean("margins"),
            accuracy=interval.accuracy,
            memory_gib=interval.memory_gib,
        )
        more = (
            f" rewards/chosen: {metrics.rewards_chosen:.4f} | rewards/rejected:"
            f" {metrics.rewards_rejected:.4f} | rewards/margins: {metrics.margin:.4f} |"
            f" rewards/accuracies: {metrics.accuracy:.4f} |"
        )
        return metrics, more
