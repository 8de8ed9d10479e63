"""The SFT trainer: what a step, a report and a checkpoint are; when, is `core.loop`'s."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import time
import uuid
from typing import Any

import torch

from hpctrain.base import errors
from hpctrain.config.trainers.sft import Batch, SftConfig, learning_rate
from hpctrain.data.spm import load_model
from hpctrain.train.core import checkpoint, ranks
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.core.logs import Metrics
from hpctrain.train.core.loop import Cadence, StepLoop
from hpctrain.train.sft import engine, export
from hpctrain.train.sft.data import DataError, PackedRows, describe_too_long, step_samples
from hpctrain.train.sft.model import (
    build_model,
    choose_attention,
    has_weights,
    longest_document,
    read_model_config,
    to_tensors,
)


class Trainer(StepLoop):
    """One rank of one link. Raises UsageError, Refused or EnvironmentFault while setting up; see
    `run` for the rest."""

    def __init__(self, config: SftConfig, launch: Launch, batch: Batch):
        cadence = Cadence(
            config.log_interval,
            config.checkpoint_factor,
            config.keep_last_n_checkpoints,
            config.max_skipped_in_a_row,
            config.stop_signal,
        )
        super().__init__(launch, cadence, config.wandb_project)
        self.config, self.batch, self.export_to = config, batch, config.export_dir
        self.device = engine.start(launch, config.distributed_timeout_s)
        self.rows = PackedRows(config)
        self.num_steps = config.train_iters or math.ceil(
            float(config.train_epochs or 1) * len(self.rows) / batch.train_batch_size
        )
        self.model_config = read_model_config(config.model)
        self.attention = choose_attention(config.attention)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.progress = checkpoint.Progress(
            run_id=uuid.uuid4().hex,
            iteration=0,
            consumed_samples=0,
            num_ranks=launch.num_ranks,
            zero_stage=config.zero_stage,
            precision=config.precision,
            data_fingerprint=self.rows.fingerprint,
            config=dataclasses.asdict(config),
            data_content=ranks.on_first(launch.rank, self.rows.content),
            train_batch_size=batch.train_batch_size,
        )
        self._check_fit()
        model_values = self.model_config.to_dict()
        resumed = (
            checkpoint.check_resume(launch.checkpoint, self.progress, model_values)
            if launch.mode == "resume"
            else None
        )
        model = self._model()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.vocab_size = int(self.model_config.vocab_size)
        self.stepper = engine.make_stepper(model, config, batch)
        if resumed is not None:
            self._resume(resumed)
        self.interval = _Interval(self.device)
        self._say_setup()

    def run(self, stop: StopRequest) -> int:
        """Train until the last iteration or the stop signal; see `StepLoop.run_steps`."""
        self.interval = _Interval(self.device)
        return self.run_steps(stop)

    def begin_step(self, stopping: bool) -> bool:
        """Read this rank's rows of the next step. Raises on all ranks when one meets bad data."""
        self.passes, self.trained_tokens, stops = self._prepare(stopping)
        return stops

    def step(self, number: int) -> bool:
        """One optimizer step; whether its gradient was not finite."""
        # Dropout's seed: another one for each step and rank, the same when the step is run again.
        torch.manual_seed((self.config.seed * 1_000_003 + number) * 65_537 + self.launch.rank)
        self.lr = learning_rate(self.config, number, self.num_steps)
        loss, self.norm, skipped = self.stepper.step(self.passes, self.lr, self.trained_tokens)
        self.interval.add(loss, self.trained_tokens)
        self.progress = dataclasses.replace(
            self.progress,
            iteration=number,
            consumed_samples=self.progress.consumed_samples + self.batch.train_batch_size,
        )
        return skipped

    def all_weights(self) -> dict[str, Any]:
        """All weights by name on the CPU of rank 0; empty on the others."""
        return self.stepper.weights(self.launch.rank)

    def write_model(self, target: str, weights: dict[str, Any]) -> None:
        """The trained model with the run's tokenizer."""
        export.export_trained(target, weights, self.progress)

    def close(self) -> None:
        """Flush the logs and leave the other ranks."""
        if self.log is not None:
            self.log.close()
        engine.finish()

    def _model(self) -> Any:
        """The model with the weights that this mode starts from; DeepSpeed's copies come after."""
        start, wanted = self.launch.checkpoint, self.config.init
        pretrained = os.path.isdir(self.config.model) and has_weights(self.config.model)
        if wanted == "pretrained" and not pretrained:
            raise errors.UsageError(f"`init: pretrained`, but `{self.config.model}` has no weights")
        source = None
        self.origin = f"random weights from seed {self.config.seed}"
        if self.launch.mode == "scratch" and pretrained and wanted != "random":
            source, self.origin = self.config.model, f"the weights of {self.config.model}"
        elif (
            self.launch.mode == "finetune"
            and os.path.isfile(os.path.join(start, "config.json"))
            and has_weights(start)
        ):
            source, self.origin = start, f"the weights of {start}"
        model = build_model(self.config, self.model_config, source, self.config.seed)
        if self.launch.mode == "finetune" and source is None:
            checkpoint.load_weights(model, start)
            self.origin = f"the weights of {start}; optimizer and iteration start fresh"
        return model

    def _check_fit(self) -> None:
        """Raises UsageError on all ranks when data or tokenizer do not belong to the model."""
        limit = longest_document(self.model_config)
        if limit and self.rows.longest - 1 > limit:
            raise errors.UsageError(
                f"the longest document has {self.rows.longest} tokens, and the model knows {limit}"
                " positions",
                where=self.launch.config,
                why="`max_position_embeddings` of the model's config.json",
                hint=(
                    f"set `seq_length` to at most {limit}; longer documents are then named and"
                    " left out"
                ),
            )
        if self.config.tokenizer:
            pieces = ranks.on_first(
                self.launch.rank, lambda: load_model(str(self.config.tokenizer)).vocab_size
            )
            export.check_vocabulary(
                pieces, int(self.model_config.vocab_size), self.config.tokenizer
            )

    def _resume(self, then: checkpoint.Progress) -> None:
        directory, tag = os.path.split(self.launch.checkpoint)
        try:
            with checkpoint.plain_types(self.launch.checkpoint):
                path, client = self.stepper.engine.load_checkpoint(directory, tag=tag)
        except (
            OSError,
            RuntimeError,
            ValueError,
            KeyError,
            AttributeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            what = f"cannot load the checkpoint: {checkpoint.describe_failure(error)}"
            raise errors.EnvironmentFault(
                what,
                where=self.launch.checkpoint,
                hint="`hpctrain checkpoint verify` looks at its files",
            ) from error
        if path is None or client.get("hpctrain", {}).get("iteration") != then.iteration:
            raise errors.EnvironmentFault(
                "DeepSpeed could not load the checkpoint", where=self.launch.checkpoint
            )
        self.origin = f"{self.launch.checkpoint}, whole, at iteration {then.iteration}"
        self.go_on_from(then, then.config, self.progress.config)
        batch = self.batch.train_batch_size
        if (
            then.train_batch_size
            and then.train_batch_size != batch
            and not self.config.train_batch_size
        ):
            ranks_now = f"with {then.num_ranks} ranks, and is {batch} with {self.batch.ranks}"
            self.say(
                f"warning: the batch was {then.train_batch_size} {ranks_now}; `train_batch_size`"
                " would keep it"
            )

    def _say_setup(self) -> None:
        rows, batch = self.rows, self.batch
        self.say(f"mode {self.launch.mode}: starts from {self.origin}")
        self.say(
            f"model {self.model_config.model_type}, {self.num_parameters:,} parameters,"
            f" {self.config.precision}, ZeRO {self.config.zero_stage}, attention {self.attention},"
            f" {batch.ranks} ranks on {self.device.type}"
        )
        self.say(
            f"data {rows.num_documents:,} documents, {rows.num_tokens:,} tokens in {len(rows):,}"
            f" rows of {rows.seq_length + 1} ({100 * rows.fill:.1f} % full)"
        )
        self.say(
            f"batch {batch.train_batch_size} = {batch.micro} x {batch.accumulation} accumulation x"
            f" {batch.ranks} ranks; {self.num_steps} iterations ="
            f" {self.num_steps * batch.train_batch_size / len(rows):.2f} epochs"
        )
        too_long = describe_too_long(rows)
        if too_long:
            self.say(f"warning: {too_long}")
        unclosed, silent = ranks.on_first(self.launch.rank, rows.look_through)
        for found, what in (
            (unclosed, "leave a loss_mask token open"),
            (silent, "hold no token that is trained"),
        ):
            if found:
                self.say(
                    f"warning: {len(found)} documents {what}, such as"
                    f" {', '.join(map(rows.name, found[:5]))}"
                )

    def _prepare(self, stopping: bool) -> tuple[list[dict[str, Any]], int, bool]:
        """This rank's arguments for the next step, the trained tokens of the whole batch, and
        whether to stop instead.

        The last two are the same on every rank. Raises on all ranks when one of them meets bad
        data.
        """
        arguments: list[dict[str, Any]] = []
        tokens, bad = 0, None
        place = (self.launch.rank, self.batch.ranks, self.batch.micro, self.batch.accumulation)
        try:
            for samples in step_samples(self.progress.consumed_samples, *place):
                rows = self.rows.micro_batch(samples)
                self.rows.check_tokens(rows, samples, self.vocab_size)
                tokens += len(rows.labels)
                arguments.append(to_tensors(rows, self.attention, self.dtype, self.device))
        except DataError as error:
            bad = error
        votes = torch.tensor(
            [tokens, int(stopping), int(bad is not None)], dtype=torch.int64, device=self.device
        )
        total, stops, bads = map(int, engine.sum_over_ranks(votes).tolist())
        if bads:
            raise bad or DataError(())  # the rank that met it says what it is
        return arguments, total, stops > 0

    def write_checkpoint(self) -> str:
        """DeepSpeed's files, the model's config, and the tokenizer where the run has one."""
        values = json.dumps(self.model_config.to_dict(), indent=1, default=str)
        extra = {"config.json": values.encode()}
        if self.config.tokenizer:
            with open(self.config.tokenizer, "rb") as file:
                extra["tokenizer.model"] = file.read()
        return checkpoint.save(
            self.stepper.engine,
            self.launch.checkpoint_dir,
            self.progress,
            extra,
            engine.barrier,
            self.launch.rank,
        )

    def report(self) -> None:
        """One log line, and one of metrics.jsonl."""
        steps, tokens, seconds, loss = self.interval.close()
        if self.log is None:
            return
        step_s = seconds / steps
        samples_per_s = self.batch.train_batch_size / step_s
        per_gpu = samples_per_s * self.config.seq_length / self.batch.ranks
        self.log.write(
            Metrics(
                iteration=self.progress.iteration,
                train_iters=self.num_steps,
                loss=loss,
                lr=self.lr,
                grad_norm=self.norm,
                step_time_s=step_s,
                samples_per_s=samples_per_s,
                tokens_per_s_per_gpu=per_gpu,
                # 6 floating point operations per parameter and token, forward and backward (arXiv
                # 2001.08361 §2.1).
                tflops_per_gpu=6 * self.num_parameters * per_gpu / 1e12,
                trained_tokens=tokens,
                consumed_samples=self.progress.consumed_samples,
                epoch=self.progress.consumed_samples / len(self.rows),
                skipped=self.stepper.skipped,
                nan=self.interval.nan,
            )
        )


class _Interval:
    """Loss, tokens and time since the last log line; one sum over ranks when it is closed, none in
    between."""

    def __init__(self, device: torch.device):
        self._device = device
        self.nan = 0
        self._start()

    def _start(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens: list[int] = []
        self._since = time.monotonic()

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        self._losses.append(loss)
        self._tokens.append(tokens)

    def exclude(self, seconds: float) -> None:
        """Leave out time that went into a checkpoint."""
        self._since += seconds

    def close(self) -> tuple[int, int, float, float]:
        """Steps, trained tokens, seconds, and the loss per trained token over the steps whose loss
        was finite; every rank must call it."""
        losses = engine.sum_over_ranks(torch.stack(self._losses)).tolist()
        seconds = time.monotonic() - self._since
        finite = [
            (loss, tokens) for loss, tokens in zip(losses, self._tokens) if math.isfinite(loss)
        ]
        self.nan += len(losses) - len(finite)
        tokens = sum(tokens for _, tokens in finite)
        loss = sum(loss for loss, _ in finite) / max(1, tokens) if finite else math.nan
        answer = (len(losses), sum(self._tokens), seconds, loss)
        self._start()
        return answer
