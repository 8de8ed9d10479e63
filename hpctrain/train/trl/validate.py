"""Is a merged model any good? Its perplexity on held-out rows, beside its base's, and whether it
answers in words.

    python -m hpctrain.train.trl.validate --model_path merged --test_set held_out.jsonl
        [--base Llama-3.1-8B-Instruct]

What needs another model as a judge (wins and ties against it) is not measured here.
"""

from __future__ import annotations

import contextlib
import math
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from hpctrain.base import errors, terminal
from hpctrain.base.errors import Problem, UsageError, need
from hpctrain.train.core.data_files import find_files, parsed_rows
from hpctrain.train.dpo.pairs import load_tokenizer
from hpctrain.train.trl import base as bases
from hpctrain.train.trl.rows import Encoder

MAX_PERPLEXITY = 10.0  # the document's bound for held-out data
ROWS, REPLIES, REPLY_TOKENS, MAX_LENGTH = 200, 8, 64, 2048
# A reply that ends in so many tokens of so few kinds goes round in a circle.
_CIRCLE, _KINDS = 24, 3


@dataclass(frozen=True)
class Reply:
    """`fault` is empty for a reply in words."""

    prompt: str
    text: str
    fault: str


@dataclass(frozen=True)
class Validation:
    """`perplexity` is of the tokens that a training on these rows would train; `base_perplexity`
    the base's on the same."""

    model: str
    test_set: str
    rows: int
    tokens: int
    perplexity: float
    base_perplexity: float | None
    max_perplexity: float
    replies: tuple[Reply, ...]

    @property
    def faults(self) -> list[str]:
        """What speaks against the model; empty when nothing does."""
        out = []
        if not self.perplexity < self.max_perplexity:  # also NaN
            out.append(
                f"its perplexity is {self.perplexity:.4g}, and less than {self.max_perplexity:g} is"
                " wanted"
            )
        if self.base_perplexity is not None and not self.perplexity < self.base_perplexity:
            out.append(
                f"its base does no worse on these rows: perplexity {self.base_perplexity:.4g}"
            )
        bad = [reply.fault for reply in self.replies if reply.fault]
        if bad:
            out.append(
                f"{len(bad)} of {len(self.replies)} replies are no answers:"
                f" {', '.join(dict.fromkeys(bad))}"
            )
        return out


def validate(
    model: str,
    test_set: str,
    base: str | None = None,
    max_perplexity: float = MAX_PERPLEXITY,
    rows: int = ROWS,
    replies: int = REPLIES,
    say: Callable[[str], None] = print,
) -> Validation:
    """Measure `model`, a Hugging Face directory, on the first `rows` rows of `test_set`, data as
    the recipe hf-sft reads them.

    Raises UsageError for a quantised or damaged model, an adapter, bad rows, and rows of which
    nothing is trained.
    """
    bases.check_base(model)
    torch, transformers = need("torch", "hf"), need("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    encoded, prompts = _rows(model, test_set, rows, replies)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(folder: str) -> Any:
        # Computed with in fp32 on a CPU, and in bf16 on a GPU, where 8 billion fp32 weights may not
        # fit.
        return (
            bases.load_base(folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
            .to(device)
            .eval()
        )

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        say(f"{model} on {len(encoded)} rows of {test_set}")
        loaded = load(model)
        loss, tokens = _loss(loaded, encoded)
        found = tuple(_reply(loaded, model, prompt) for prompt in prompts)
        base_loss = None
        if base is not None:
            del loaded
            say(f"its base {base} on the same rows")
            base_loss = _loss(load(base), encoded)[0] / tokens
    return Validation(
        model,
        test_set,
        len(encoded),
        tokens,
        perplexity(loss / tokens),
        None if base_loss is None else perplexity(base_loss),
        max_perplexity,
        found,
    )


def perplexity(loss: float) -> float:
    """e to the mean loss per token; infinite where that is too large for a number."""
    if math.isnan(loss):
        return loss
    return math.exp(loss) if loss < 700 else math.inf


def fault_of(text: str, ids: Sequence[int], whole: bool) -> str:
    """What is wrong with a reply: `empty`, `garbled`, `goes round in a circle`, or nothing.
    `whole`: it was not cut."""
    text = text if whole else text.rstrip("\ufffd")  # cut inside a character
    if not text.strip():
        return "empty"
    odd = sum(
        unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs")
        and char not in "\n\r\t"
        or char == "\ufffd"
        for char in text
    )
    if odd > 0.05 * len(text):
        return "garbled"
    if len(ids) >= _CIRCLE and len(set(ids[-_CIRCLE:])) <= _KINDS:
        return "goes round in a circle"
    return ""


def _rows(
    model: str, test_set: str, limit: int, replies: int
) -> tuple[list[tuple[list[int], list[int]]], list[list[int]]]:
    """The first rows as tokens and labels, and the prompts of the first of them that have one."""
    encoder = Encoder(load_tokenizer(model), MAX_LENGTH, None, False, None)
    files = find_files(test_set, "test", "test")
    read = list(
        parsed_rows(files, lambda row, where: (encoder.encode(row), encoder.prompt(row)), limit)
    )
    encoded = [tokens for tokens, _ in read if tokens]
    prompts = [prompt[-MAX_LENGTH:] for _, prompt in read if prompt][:replies]
    if not encoded:
        raise UsageError("no row of it has a token that a training would train", where=test_set)
    return encoded, prompts


def _loss(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """The summed loss and the number of the trained tokens, one row at a time."""
    torch = need("torch", "hf")
    device, total, count = next(model.parameters()).device, 0.0, 0
    for ids, labels in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, :-1].float()
        wanted = torch.tensor(labels[1:], device=device)
        total += float(
            torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        )
        count += int((wanted != -100).sum())
    return total, count


def _reply(model: Any, folder: str, prompt: list[int]) -> Reply:
    torch = need("torch", "hf")
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=REPLY_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    new = made[0, len(prompt) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Reply(tokenizer.decode(prompt), text, fault_of(text, new, len(new) < REPLY_TOKENS))


def describe(found: Validation) -> list[str]:
    """The figures in words."""
    of_base = (
        "" if found.base_perplexity is None else f"; its base's is {found.base_perplexity:.4g}"
    )
    return [
        (
            f"perplexity {found.perplexity:.4g} over {found.tokens:,} tokens of {found.rows}"
            f" held-out rows{of_base}"
        ),
        (
            f"{sum(not reply.fault for reply in found.replies)} of {len(found.replies)} replies are"
            " in words"
        ),
    ]


@click.command()
@click.option(
    "--model_path",
    required=True,
    help="A Hugging Face directory, such as `hpctrain export` writes.",
)
@click.option("--test_set", required=True, help="Held-out rows: jsonl, parquet or a saved dataset.")
@click.option("--base", help="The model it was made from, measured on the same rows.")
@click.option("--max_perplexity", type=float, default=MAX_PERPLEXITY, show_default=True)
@click.option(
    "--rows", type=click.IntRange(1), default=ROWS, show_default=True, help="How many rows to read."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model_path: str,
    test_set: str,
    base: str | None,
    max_perplexity: float,
    rows: int,
    as_json: bool,
) -> None:
    """Measure a merged model on held-out rows; exits with 1 when it falls short."""
    try:
        found = validate(model_path, test_set, base, max_perplexity, rows, say=terminal.info)
    except errors.HpctrainError as error:
        terminal.problems(error.problems)
        raise click.exceptions.Exit(error.exit_code) from error
    show(found, as_json)
    if found.faults:
        raise click.exceptions.Exit(errors.NO)


def show(found: Validation, as_json: bool) -> None:
    if as_json:
        terminal.data_json(**asdict(found), faults=found.faults)
        return
    for line in describe(found):
        terminal.data(line)
    terminal.problems([Problem(fault, where=found.model) for fault in found.faults])


if __name__ == "__main__":
    command()
