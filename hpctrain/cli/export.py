from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hpctrain.base import terminal
from hpctrain.base.errors import NO, Problem, UsageError
from hpctrain.base.shell import quote
from hpctrain.cli import common

if TYPE_CHECKING:
    from hpctrain.jobs.neox_export import NeoxExport
    from hpctrain.train.core.source import Checkpoint


@click.command()
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path())
@click.option(
    "-o",
    "--out",
    "directory",
    required=True,
    type=click.Path(),
    help="A directory that does not exist yet.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto: as trained.",
)
@click.option("--tokenizer", type=click.Path(), help="SentencePiece model [default: the run's].")
@click.option(
    "--base",
    type=click.Path(),
    help="Where the base of a LoRA update lies [default: as the update says].",
)
@click.option(
    "--checkpoint",
    metavar="NAME",
    help="GPT-NeoX: this one of the run's checkpoints, not the newest.",
)
@click.option(
    "--sbatch",
    "options",
    multiple=True,
    metavar="OPTION",
    help="GPT-NeoX: for the job, e.g. --partition=largemem.",
)
@click.option("--wait", is_flag=True, help="GPT-NeoX: until the job has ended.")
@click.option(
    "--validate",
    "test_set",
    type=click.Path(),
    help="LoRA update: measure the model on these held-out rows.",
)
@click.option("--max-perplexity", type=float, help="What --validate asks for [default: 10].")
@common.dry_run
@common.as_json
def command(
    source: str,
    directory: str,
    precision: str,
    tokenizer: str | None,
    base: str | None,
    checkpoint: str | None,
    options: tuple[str, ...],
    wait: bool,
    test_set: str | None,
    max_perplexity: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a run's newest weights as a Hugging Face directory, tokenizer and chat template
    included.

    A LoRA update is merged into its full-precision base, and what was written is compared with base
    + update. With --validate its perplexity on held-out rows and some replies are judged as well:
    the exit code is 1 when it falls short. For GPT-NeoX a job runs NeoX's own converter, in the
    run's container and without GPUs, and makes the directory.

    \b
    hpctrain export runs/ft_7 -o models/ft_7
    hpctrain export checkpoints/ft_7/global_step1200 -o models/ft_7_1200 --precision fp32
    hpctrain export checkpoints/phase1a/checkpoint-2000 -o models/phase1a --base models/Llama-8B
    hpctrain export runs/phase1a -o models/phase1a --validate held_out.jsonl
    hpctrain export runs/neox_7 -o /scratch/me/models/neox_7 --sbatch=--partition=largemem
    """
    from hpctrain.jobs import neox_export

    if neox_export.is_neox_run(source):
        plan = neox_export.plan_export(source, directory, checkpoint, precision, tokenizer, options)
        _by_job(plan, wait, dry_run, as_json)
        return
    if checkpoint or options or wait:
        raise UsageError(
            "--checkpoint, --sbatch and --wait are for runs of GPT-NeoX",
            hint="name the checkpoint itself",
        )
    if max_perplexity is not None and not test_set:
        raise UsageError(
            "`--max-perplexity` without `--validate`",
            hint="name the held-out rows: --validate FILE",
        )
    from hpctrain.train.core.source import find_checkpoint

    found = find_checkpoint(source)
    if found:
        _of_trl(found, directory, precision, base, test_set, max_perplexity, dry_run, as_json)
    elif test_set:
        raise UsageError(
            "--validate is for runs of hf-sft",
            where=source,
            hint="`hpctrain generate` shows replies",
        )
    else:
        _of_sft(source, directory, precision, tokenizer, dry_run, as_json)


def _of_sft(
    source: str, directory: str, precision: str, tokenizer: str | None, dry_run: bool, as_json: bool
) -> None:
    from hpctrain.train.core.source import find_source
    from hpctrain.train.sft.export import check_target, export

    found = find_source(source)
    check_target(found, directory)
    files = [] if dry_run else export(found, directory, precision, tokenizer)
    if as_json:
        terminal.data_json(
            directory=directory, checkpoint=found.path, iteration=found.iteration, files=files
        )
    elif dry_run:
        terminal.info(f"would export {found.path}")
    else:
        terminal.info(f"exported {found.path}: {', '.join(files)}")
        terminal.data(directory)
        terminal.next_step(f"hpctrain generate {quote(directory)} --prompt '…'")


def _of_trl(
    found: Checkpoint,
    directory: str,
    precision: str,
    base: str | None,
    test_set: str | None,
    max_perplexity: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from hpctrain.train.trl import validate
    from hpctrain.train.trl.export import describe, export_checkpoint

    if dry_run:
        terminal.info(f"would export {found.path}")
        return
    files, proof = export_checkpoint(found, directory, precision, base, terminal.info)
    measured = None
    if test_set:
        measured = validate.validate(
            directory,
            test_set,
            max_perplexity=max_perplexity or validate.MAX_PERPLEXITY,
            say=terminal.info,
        )
    if as_json:
        terminal.data_json(
            directory=directory,
            checkpoint=found.path,
            iteration=found.iteration,
            files=files,
            proof=vars(proof),
            validation={**asdict(measured), "faults": measured.faults} if measured else None,
        )
    else:
        for line in [*describe(proof), *(validate.describe(measured) if measured else ())]:
            terminal.info(line)
        terminal.info(f"exported {found.path}: {', '.join(files)}")
        terminal.data(directory)
    if measured and measured.faults:
        terminal.problems([Problem(fault, where=directory) for fault in measured.faults])
        raise click.exceptions.Exit(NO)


def _by_job(plan: NeoxExport, wait: bool, dry_run: bool, as_json: bool) -> None:
    from hpctrain.base.units import format_mem_gib, format_size
    from hpctrain.jobs import neox_export

    terminal.notes(plan.notes)
    terminal.info(
        f"{plan.checkpoint}: {format_size(plan.weights_bytes)} of weights; the job takes"
        f" {format_mem_gib(plan.mem_gib)} of memory and up to {format_size(plan.disk_bytes)} of"
        " disk"
    )
    job = log = None
    if not dry_run:
        from hpctrain.train.sft.export import export_tokenizer

        job, log = neox_export.submit(
            plan, neox_export.make_tokenizer(plan, export_tokenizer), wait
        )
    if as_json:
        terminal.data_json(
            directory=plan.out,
            checkpoint=plan.checkpoint,
            precision=plan.precision,
            job_id=job,
            log=log,
            mem_gib=plan.mem_gib,
            disk_bytes=plan.disk_bytes,
        )
    elif dry_run:
        terminal.data(plan.command_line())
    elif wait:
        terminal.data(plan.out)
        terminal.next_step(f"hpctrain generate {quote(plan.out)} --prompt '…'")
    else:
        terminal.info(f"job {job} makes {plan.out}; its log: {log}")
        terminal.data(str(job))
        terminal.next_step(
            f"tail -F {quote(log)}    # and when it is done: hpctrain generate {quote(plan.out)}"
            " --prompt '…'"
        )
