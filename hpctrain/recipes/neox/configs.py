"""The configuration as text: one self-contained YAML file per mode, the same bytes for the same
values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import yaml

from hpctrain.recipes.neox.draft import ordered
from hpctrain.recipes.neox.keys import Key

# Each of the arguments that carry the configuration to every rank must stay below Linux's
# MAX_ARG_STRLEN (128 KiB, include/uapi/linux/binfmts.h); it holds the values and the file's own
# text, in base64.
MAX_TEXT_BYTES = 40_000
_TITLES = {
    "DeepspeedConfig": "batch, optimizer, ZeRO",
    "DeepspeedRunner": "launcher",
    "Parallelism": "parallelism",
    "Model": "model",
    "Optimizer": "optimizer",
    "LRScheduler": "learning rate",
    "Logging": "logging",
    "Other": "fine-tuning and ranks",
    "Tokenizer": "tokenizer",
    "Training": "data, length, checkpoints",
    "Textgen": "generation and experts",
    "MoE": "experts",
}


def config_text(values: Mapping[str, Any], keys: Mapping[str, Key], header: Iterable[str]) -> str:
    """YAML that NeoX's `yaml.load(…, FullLoader)` reads back with the same values and types.

    Keys stand in NeoX's own order, texts are quoted, numbers with an exponent have a dot.
    """
    lines = [f"# {line}".rstrip() for line in header]
    names = ordered(keys, values)

    def group(name: str) -> str:
        return keys[name].group if name in keys else ""

    for title, members in groupby(names, key=group):
        lines += ["", f"# --- {_TITLES.get(title, 'keys of your own copy')}"]
        lines.append(dump({name: values[name] for name in members}).rstrip("\n"))
    return "\n".join(lines) + "\n"


def dump(value: Any) -> str:
    """One value as YAML: mappings as blocks, lists in one line, texts in double quotes."""
    return str(
        yaml.dump(_quoted(value), Dumper=_Dumper, sort_keys=False, width=10**9, allow_unicode=True)
    )


_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,60}", re.ASCII)


class _Quoted(str):
    """A text written in double quotes, so that no reader takes it for anything else."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return _Quoted(value) if isinstance(value, str) else value


def _key(key: Any) -> Any:
    """A plain word stays bare; any other text is quoted, as no reader folds what is in double
    quotes."""
    return _Quoted(key) if isinstance(key, str) and not _WORD.fullmatch(key) else key


_Dumper.add_representer(
    _Quoted,
    lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style='"'),
)
_Dumper.add_representer(
    dict,
    lambda dumper, value: dumper.represent_mapping(
        "tag:yaml.org,2002:map", value, flow_style=False
    ),
)
_Dumper.add_representer(
    list,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=True
    ),
)
