from __future__ import annotations

from dataclasses import asdict

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@click.argument("source", metavar="RUN", type=click.Path())
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="What the user says; several give several replies.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Longest reply.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 1000),
    default=0.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Nucleus sampling.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the sampling.",
)
@click.option(
    "--tokenizer",
    type=click.Path(),
    help="SentencePiece model [default: the one in the checkpoint].",
)
@common.as_json
def command(
    source: str,
    prompts: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    tokenizer: str | None,
    as_json: bool,
) -> None:
    """Answer prompts with a run's newest weights, each prompt framed by the control tokens it was
    trained with.

    \b
    hpctrain generate runs/ft_7 --prompt 'Translate to Latvian: Open the file'
    hpctrain generate models/ft_7 -p 'Hello' -p 'Goodbye' --temperature 0.7 --json
    """
    from hpctrain.train.core.generate import answer
    from hpctrain.train.core.source import find_source

    found = find_source(source)
    replies = answer(
        found,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        tokenizer=tokenizer,
    )
    if as_json:
        terminal.data_json(
            source=found.path,
            iteration=found.iteration,
            replies=[asdict(reply) for reply in replies],
        )
        return
    for reply in replies:
        terminal.data(reply.text)
        if reply.stopped_by == "length":
            terminal.info(f"(cut after {len(reply.ids)} tokens)")
