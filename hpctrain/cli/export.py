from __future__ import annotations

import click

from hpctrain import output
from hpctrain.cli import common


@click.command()
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path())
@click.option("-o", "--out", "directory", required=True, type=click.Path(), help="A directory that does not exist yet.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto: as trained.",
)
@click.option("--tokenizer", type=click.Path(), help="SentencePiece model [default: the one in the checkpoint].")
@click.option("--base", type=click.Path(), help="Where the base of a LoRA update lies [default: as the update says].")
@common.as_json
def command(
    source: str, directory: str, precision: str, tokenizer: str | None, base: str | None, as_json: bool
) -> None:
    """Write a run's newest weights as a Hugging Face directory, tokenizer and chat template included.

    A LoRA update is merged into its full-precision base, and what was written is compared with base + update.

    \b
    hpctrain export runs/ft_7 -o models/ft_7
    hpctrain export checkpoints/ft_7/global_step1200 -o models/ft_7_1200 --precision fp32
    hpctrain export checkpoints/phase1a/checkpoint-2000 -o models/phase1a --base models/Llama-3.1-8B-Instruct
    """
    from hpctrain.train.hf_sft.source import find_checkpoint

    checkpoint = find_checkpoint(source)
    if checkpoint:
        from hpctrain.train.hf_sft.export import describe, export_checkpoint

        files, proof = export_checkpoint(checkpoint, directory, precision, base, output.info)
        if as_json:
            output.data_json(directory=directory, checkpoint=checkpoint.path, iteration=checkpoint.iteration, files=files,
                             proof=vars(proof))  # fmt: skip
            return
        for line in describe(proof):
            output.info(line)
        output.info(f"exported {checkpoint.path}: {', '.join(files)}")
        output.data(directory)
        return
    from hpctrain.train.export import export
    from hpctrain.train.source import find_source

    found = find_source(source)
    files = export(found, directory, precision, tokenizer)
    if as_json:
        output.data_json(directory=directory, checkpoint=found.path, iteration=found.iteration, files=files)
        return
    output.info(f"exported {found.path}: {', '.join(files)}")
    output.data(directory)
    output.next_step(f"hpctrain generate {directory} --prompt '…'")
