"""`hpctrain data`: look at, check, count, pack and merge indexed datasets."""

from __future__ import annotations

import shlex
from dataclasses import asdict

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.group()
def command() -> None:
    """Look at, check, count, pack and merge Megatron/NeoX datasets.

    \b
    hpctrain data inspect P_text_document --tokenizer model.model -n 3
    hpctrain data pack P_text_document --seq-length 8192 --micro-batch 3 --data-parallel 192
    """


def _ids(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(word) for word in value.replace(" ", ",").split(",") if word)
    except ValueError:
        raise click.BadParameter(f"`{value}` is not a list of ids such as 7,7") from None


_prefix = click.argument("prefix", type=click.Path(), metavar="PREFIX")


@command.command("inspect")
@_prefix
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(),
    metavar="MODEL",
    help="The SentencePiece .model file.",
)
@click.option("-n", "count", default=100, show_default=True, help="How many documents.")
@click.option("--first", default=0, show_default=True, help="The number of the first one.")
@click.option(
    "--mask-pairs", callback=_ids, metavar="IDS", help="NeoX loss_mask_pairs [default: user, user]."
)
@click.option(
    "--mask-alternating",
    callback=_ids,
    metavar="IDS",
    help="NeoX loss_mask_alternating_individual [default: assistant].",
)
@click.option("--mask-individual", callback=_ids, metavar="IDS", help="NeoX loss_mask_individual.")
@common.as_json
def inspect_(
    prefix: str,
    tokenizer: str,
    count: int,
    first: int,
    mask_pairs: tuple[int, ...] | None,
    mask_alternating: tuple[int, ...] | None,
    mask_individual: tuple[int, ...] | None,
    as_json: bool,
) -> None:
    """Show documents as text, pieces and ids, and which tokens the loss is computed on.

    \b
    hpctrain data inspect P_text_document --tokenizer model.model -n 3
    """
    from hpctrain.base import files
    from hpctrain.data.dataset import inspect
    from hpctrain.data.dataset.indexed_dataset import open_dataset
    from hpctrain.data.dataset.loss_mask import MaskRules
    from hpctrain.data.spm import load_model

    dataset, model = open_dataset(prefix), load_model(tokenizer)
    usual = inspect.default_rules(
        (files.read_json(dataset.prefix + ".json") or {}).get("control"), model
    )
    if mask_pairs is not None and len(mask_pairs) % 2:
        raise errors.UsageError(
            "an odd number of ids: NeoX wants open, close, open, close, …", where="--mask-pairs"
        )
    rules = MaskRules(
        pairs=usual.pairs if mask_pairs is None else tuple(zip(mask_pairs[::2], mask_pairs[1::2])),
        alternating=usual.alternating if mask_alternating is None else mask_alternating,
        individual=mask_individual or (),
    )
    shown = inspect.documents(dataset, model, rules, first, count)
    if as_json:
        terminal.data_json(
            dataset=dataset.prefix,
            mask=asdict(rules),
            documents=[asdict(document) for document in shown],
        )
        return
    for document in shown:
        head = (
            f"document {document.index}: {document.num_tokens} tokens, {document.num_trained}"
            " trained"
        )
        terminal.data(terminal.paint(head, "bold"))
        for stretch in document.stretches:
            style = "green" if stretch.trained else "dim"
            terminal.data(
                f"  {'trained' if stretch.trained else 'masked '} "
                f" {terminal.paint(inspect.printable(stretch.text), style)}"
            )
            terminal.data(
                "    pieces "
                + terminal.paint(" ".join(map(inspect.printable, stretch.pieces)), style)
            )
            terminal.data("    ids    " + " ".join(map(str, stretch.ids)))
        terminal.problems(document.problems)
    terminal.next_step(shlex.join(["hpctrain", "data", "pack", prefix, "--seq-length", "8192"]))


@command.command()
@_prefix
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="Write tokens per document, one a line (.csv: with numbers).",
)
@click.option("--picture", type=click.Path(), help="Write the histogram as .png, .svg or .pdf.")
@common.as_json
def count(prefix: str, out: str | None, picture: str | None, as_json: bool) -> None:
    """Count tokens per document: a summary, a histogram, and all the numbers if asked.

    \b
    hpctrain data count P_text_document -o counts.txt --picture counts.png
    """
    from hpctrain.data.dataset import count as counting
    from hpctrain.data.dataset.indexed_dataset import open_dataset

    dataset = open_dataset(prefix)
    numbers = counting.summary(dataset)
    rows = counting.histogram(dataset.sizes)
    if out:
        counting.write_counts(dataset, out)
    if picture:
        counting.write_picture(dataset, picture)
    if as_json:
        terminal.data_json(
            dataset=dataset.prefix, dtype=dataset.dtype, summary=numbers, histogram=rows
        )
        return
    terminal.table([(name, f"{value:,.1f}".removesuffix(".0")) for name, value in numbers.items()])
    for line in counting.bars(rows):
        terminal.info(line)
    for path in filter(None, (out, picture)):
        terminal.info(f"written: {path}")


@command.command()
@_prefix
@click.option(
    "--tokenizer", type=click.Path(), metavar="MODEL", help="Also check ids against this model."
)
@click.option(
    "--eod", default="", metavar="PIECE", help="Also check that every document ends with it."
)
@common.as_json
def verify(prefix: str, tokenizer: str | None, eod: str, as_json: bool) -> None:
    """Check a dataset: structure, lengths, ids, EOD, and the hashes that were recorded when it was
    made.

    \b
    hpctrain data verify P_text_document
    """
    from hpctrain.data.dataset.verify import verify_dataset
    from hpctrain.data.spm import load_model

    dataset, problems = verify_dataset(prefix, load_model(tokenizer) if tokenizer else None, eod)
    bad = [problem for problem in problems if problem.level == "error"]
    if as_json:
        terminal.data_json(
            ok=not bad,
            dataset=dataset.prefix,
            documents=len(dataset),
            tokens=dataset.num_tokens,
            dtype=dataset.dtype,
            problems=[problem.as_json() for problem in problems],
        )
    else:
        terminal.problems(problems)
        terminal.data(
            f"{'ok' if not bad else 'damaged'}: {len(dataset):,} documents, {dataset.num_tokens:,}"
            f" tokens, {dataset.dtype}"
        )
    common.exit_if(bad)


@command.command()
@_prefix
@click.option("--seq-length", required=True, type=int, help="seq_length of the training.")
@click.option("--micro-batch", default=1, show_default=True, help="train_micro_batch_size_per_gpu.")
@click.option("--accumulation", default=1, show_default=True, help="gradient_accumulation_steps.")
@click.option(
    "--data-parallel",
    default=1,
    show_default=True,
    help="Data parallel size: GPUs / model parallel size.",
)
@click.option("--epochs", default=1, show_default=True, help="How often training sees the data.")
@click.option("--bins", default=16, show_default=True, help="Open bins; 16 in the fork's code.")
@click.option("--seed", default=1234, show_default=True, help="Seed of the shuffle.")
@common.as_json
def pack(
    prefix: str,
    seq_length: int,
    micro_batch: int,
    accumulation: int,
    data_parallel: int,
    epochs: int,
    bins: int,
    seed: int,
    as_json: bool,
) -> None:
    """Simulate k_bin_packed: packing efficiency, documents that training would silently skip, and
    the train_iters to set.

    \b
    hpctrain data pack P_text_document --seq-length 8192 --micro-batch 3 --data-parallel 192
    """
    from hpctrain.data.dataset.indexed_dataset import open_dataset
    from hpctrain.data.dataset.pack import pack as simulate
    from hpctrain.data.dataset.pack import schedule

    dataset = open_dataset(prefix)
    packings = simulate(dataset.sizes, seq_length, bins, seed, epochs)
    one, plan = packings[0], schedule(packings, micro_batch, accumulation, data_parallel)
    if as_json:
        terminal.data_json(
            dataset=dataset.prefix, packing=asdict(one), schedule=asdict(plan), epochs=epochs
        )
        return
    if one.skipped_documents:
        share = 100 * one.skipped_tokens / max(1, dataset.num_tokens)
        text = (
            f"{one.skipped_documents:,} of {one.documents:,} documents ({share:.1f}% of the tokens)"
            f" exceed {seq_length + 1} tokens"
        )
        hint = f"the longest has {one.longest:,}; training skips them with a warning only"
        terminal.problems([errors.Problem(text, where=dataset.prefix, hint=hint, level="warning")])
    terminal.table(
        [
            ("samples per epoch", f"{plan.samples_per_epoch:,.0f}"),
            ("packing efficiency", f"{100 * one.efficiency:.2f}%"),
            ("documents skipped", f"{one.skipped_documents:,}"),
            ("train_batch_size", f"{plan.train_batch_size:,}"),
            ("iterations per epoch", f"{plan.iters_per_epoch:,.2f}"),
            (f"train_iters for {epochs} epoch{'s' if epochs > 1 else ''}", f"{plan.train_iters}"),
        ]
    )


@command.command()
@click.argument("prefixes", nargs=-1, required=True, type=click.Path(), metavar="PREFIX...")
@click.option("-o", "--out", required=True, type=click.Path(), help="The prefix of the result.")
@click.option("--force", is_flag=True, help="Replace a dataset of that name.")
@common.as_json
def merge(prefixes: tuple[str, ...], out: str, force: bool, as_json: bool) -> None:
    """Concatenate datasets into one, in the order given.

    \b
    hpctrain data merge A_text_document B_text_document -o C_text_document
    """
    from hpctrain.data.merge import merge_datasets

    merged = merge_datasets(prefixes, out, force)
    if as_json:
        terminal.data_json(**merged)
        return
    terminal.info(
        f"{merged['documents']:,} documents, {merged['tokens']:,} tokens, {merged['dtype']}"
    )
    terminal.data(merged["output"])
    terminal.next_step(shlex.join(["hpctrain", "data", "verify", merged["output"]]))
