"""Durations, memory and node lists: parsed and formatted here and nowhere else."""

from __future__ import annotations

import operator
import re

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_UNIT_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", re.ASCII)
_SLURM_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?\Z", re.ASCII)
_MEM = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?(?:i?b)?\Z", re.IGNORECASE | re.ASCII)
_MEM_GIB = {"k": 1 / 1024**2, "m": 1 / 1024, "g": 1.0, "t": 1024.0}
_BRACKET = re.compile(r"([^\[\],]*)(?:\[([^\[\]]*)\])?([^\[\],]*)\Z")


def parse_time_s(value: str | int | float) -> int:
    """A duration in whole seconds, from Slurm's forms (`20:00:00`, `1-00:00:00`, `90` = minutes) or
    `20h`, `1d12h`, `90s`.

    Slurm's forms are those of `man sbatch --time`: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes, days-hours:minutes:seconds. Raises ValueError for anything else,
    and for zero.
    """
    text = str(value).strip().lower()
    found = _UNIT_TIME.findall(text)
    if found and not _UNIT_TIME.sub("", text).strip():
        seconds = round(sum(float(number) * _UNITS_S[unit] for number, unit in found))
    else:
        match = _SLURM_TIME.match(text)
        if not match:
            raise ValueError(f"`{value}` is not a duration such as 20:00:00, 1-00:00:00 or 20h")
        days, *parts = match.groups()
        numbers = [int(part) for part in parts if part is not None]
        count = 3 if days is not None else len(numbers)  # after days the first number is hours
        parts_s = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[count]
        seconds = int(days or 0) * 86400 + sum(map(operator.mul, numbers, parts_s))
    if seconds <= 0:
        raise ValueError(f"`{value}` is no time at all")
    if seconds > 10 * 366 * 86400:
        raise ValueError(f"`{value}` is longer than ten years")
    return seconds


def format_time(time_s: int) -> str:
    """Slurm's long form, `D-HH:MM:SS` or `HH:MM:SS`, which `parse_time_s` reads back."""
    days, rest = divmod(int(time_s), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def format_duration(time_s: float) -> str:
    """A duration for people: `42s`, `7m05s`, `3h20m`, `2d04h`."""
    total = int(round(time_s))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def parse_mem_gib(value: str | int | float) -> float:
    """Memory in GiB from Slurm's form (`480G`, `60000M`, `1T`; a bare number is MiB, as in `sbatch
    --mem`)."""
    match = _MEM.match(str(value).strip())
    if not match:
        raise ValueError(f"`{value}` is not an amount of memory such as 480G")
    number, unit = match.groups()
    return float(number) * _MEM_GIB[(unit or "m").lower()]


def format_mem_gib(mem_gib: float) -> str:
    """Slurm's form of an amount in GiB: whole GiB as `480G`, anything else in MiB, rounded down."""
    return f"{int(mem_gib)}G" if float(mem_gib).is_integer() else f"{int(mem_gib * 1024)}M"


def format_size(num_bytes: float) -> str:
    """A size for people: `17 B`, `3.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")


def expand_nodes(text: str, limit: int = 100_000) -> list[str]:
    """Host names from Slurm's compressed form: `nid[000001-000003,7],login1`, in order, one bracket
    a name.

    Raises ValueError when malformed or when more than `limit` names would come out.
    """
    names: list[str] = []
    for item in _split_outside_brackets(text):
        match = _BRACKET.match(item)
        if not match or not item:
            raise ValueError(f"`{text}` is not a list of nodes such as nid[000001-000004]")
        prefix, inside, suffix = match.groups()
        if inside is None:
            names.append(prefix + suffix)
            continue
        for part in inside.split(","):
            low, dash, high = part.partition("-")
            if not low.isdigit() or (dash and not high.isdigit()):
                raise ValueError(f"`{part}` in `{text}` is not a range of nodes")
            first, last = int(low), int(high or low)
            if last < first or last - first >= limit or len(names) + last - first >= limit:
                raise ValueError(f"`{part}` in `{text}` is not a plausible range of nodes")
            names.extend(
                f"{prefix}{number:0{len(low)}d}{suffix}" for number in range(first, last + 1)
            )
    return names


def compress_nodes(names: list[str]) -> str:
    """Slurm's compressed form of host names, `nid[000001-000003]`; `expand_nodes` gives the same
    set back."""
    groups: dict[tuple[str, int], list[int]] = {}
    plain: list[str] = []
    for name in dict.fromkeys(names):
        match = re.search(r"(\d+)\Z", name, re.ASCII)
        if match:
            groups.setdefault((name[: match.start()], len(match.group(1))), []).append(
                int(match.group(1))
            )
        else:
            plain.append(name)
    out = []
    for (prefix, width), numbers in groups.items():
        ranges: list[tuple[int, int]] = []
        for number in sorted(numbers):
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], number)
            else:
                ranges.append((number, number))
        parts = [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in ranges]
        single = len(parts) == 1 and "-" not in parts[0]
        out.append(prefix + parts[0] if single else f"{prefix}[{','.join(parts)}]")
    return ",".join(out + plain)


def _split_outside_brackets(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            items.append(text[start:index])
            start = index + 1
    return [*items, text[start:]]
