"""The footer of a parquet file: its columns and its number of rows. No data is read."""

from __future__ import annotations

from typing import Any, NamedTuple


class Footer(NamedTuple):
    """`columns`: name -> its kind: text, list, or Arrow's own name of another."""

    rows: int
    columns: dict[str, str]


class NoParquet(ValueError):
    """Why a file is no parquet file."""


def read_footer(path: str) -> Footer | None:
    """The footer of a file, None where pyarrow is not installed. Raises NoParquet for what is none,
    OSError where it cannot be read."""
    try:  # takes longer to import than a hundred footers to read, so only where there is a file
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    try:
        with open(path, "rb") as file:
            found = parquet.ParquetFile(file)
            columns = {field.name: _kind(field.type) for field in found.schema_arrow}
            return Footer(found.metadata.num_rows, columns)
    except pyarrow.ArrowException as error:
        raise NoParquet(f"no parquet file, or one that is cut short: {error}") from None


def _kind(arrow_type: Any) -> str:
    name = str(arrow_type)
    if name in ("string", "large_string", "string_view"):
        return "text"
    return "list" if "list" in name.split("<")[0] else name
