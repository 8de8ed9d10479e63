"""Tokens per document: the numbers, a summary of them, and a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.base import files
from hpctrain.base.errors import UsageError, need
from hpctrain.data.dataset.indexed_dataset import Dataset

PERCENTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def summary(dataset: Dataset) -> dict[str, float]:
    """count, mean, std, min, percentiles and max of tokens per document, by pandas; empty for an
    empty dataset."""
    pandas = need("pandas", "report")
    if not len(dataset):
        return {"count": 0, "tokens": 0}
    described = pandas.Series(dataset.sizes).describe(percentiles=list(PERCENTILES))
    described = described.dropna()  # a single document has no standard deviation, and JSON no NaN
    return {
        "tokens": float(dataset.num_tokens),
        **{str(name): float(value) for name, value in described.items()},
    }


def histogram(sizes: NDArray[Any], bins: int = 20) -> list[tuple[int, int, int]]:
    """(from, below, documents) on a scale of powers, so that short and long documents both show."""
    if not len(sizes):
        return []
    low, high = int(sizes.min()), int(sizes.max()) + 1
    edges = np.unique(
        np.round(np.geomspace(max(low, 1), max(high, low + 1), bins + 1)).astype(np.int64)
    )
    edges[0] = min(int(edges[0]), low)
    if len(edges) < 2:
        edges = np.array([low, high])
    edges[-1] = high
    counts, _ = np.histogram(sizes, edges)
    return [(int(a), int(b), int(n)) for a, b, n in zip(edges, edges[1:], counts)]


def bars(rows: list[tuple[int, int, int]], width: int = 40) -> list[str]:
    """The histogram as lines of text."""
    most = max((count for _, _, count in rows), default=0) or 1
    digits = max((len(f"{below - 1:,}") for _, below, _ in rows), default=1)
    return [
        f"{begin:>{digits},} - {below - 1:>{digits},}  {count:>10,}  "
        + "#" * -(-count * width // most)
        for begin, below, count in rows
    ]


def write_counts(dataset: Dataset, path: str) -> None:
    """One number a line, in order; with a header and document numbers when `path` ends in .csv."""
    is_csv = path.endswith(".csv")
    with files.temporaries(path) as (temp,):
        if is_csv:
            temp.file.write(b"document,tokens\n")
        for begin in range(0, len(dataset), 1 << 18):
            part = dataset.sizes[begin : begin + (1 << 18)].tolist()
            lines = (
                f"{begin + at},{size}\n" if is_csv else f"{size}\n" for at, size in enumerate(part)
            )
            temp.file.write("".join(lines).encode())
        temp.commit()


def write_picture(dataset: Dataset, path: str) -> None:
    """The histogram as .png, .svg or .pdf. Raises UsageError for another ending."""
    if not path.endswith((".png", ".svg", ".pdf")):
        raise UsageError(
            f"`{path}` is no picture", where="--picture", hint="end it in .png, .svg or .pdf"
        )
    need("matplotlib", "report").use("Agg")
    pyplot = need("matplotlib.pyplot", "report")
    rows = histogram(dataset.sizes, bins=60)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    edges = [begin for begin, _, _ in rows] + [below for _, below, _ in rows[-1:]]
    axes.stairs([count for _, _, count in rows], edges or [0, 1], fill=True)
    if len(dataset) and int(dataset.sizes.max()) > 10 * max(1, int(dataset.sizes.min())):
        axes.set_xscale("log")
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.set_title(f"{len(dataset):,} documents, {dataset.num_tokens:,} tokens")
    with files.temporaries(path) as (temp,):
        figure.savefig(temp.file, format=path.rsplit(".", 1)[1])
        temp.commit()
    pyplot.close(figure)
