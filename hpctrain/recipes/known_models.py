"""Shapes of published models, for those that do not lie here: by the pattern of their names.

From the models' own config.json; the tests hold each against its published number of parameters.
"""

from __future__ import annotations

import re

from hpctrain.recipes.memory import Shape

SHAPES = {
    r"llama-3(\.1)?-(tulu-3(\.\d)?-)?8b": Shape(32, 4096, 4096, 1024, 14336, 128256),
    r"llama-3\.2-1b": Shape(16, 2048, 2048, 512, 8192, 128256, tied=True),
    r"llama-3\.2-3b": Shape(28, 3072, 3072, 1024, 8192, 128256, tied=True),
    r"llama-3(\.[13])?-(tulu-3(\.\d)?-)?70b": Shape(80, 8192, 8192, 1024, 28672, 128256),
    r"llama-3(\.1)?-(tulu-3(\.\d)?-)?405b": Shape(126, 16384, 16384, 1024, 53248, 128256),
    r"llama-2-7b": Shape(32, 4096, 4096, 4096, 11008, 32000),
    r"llama-2-13b": Shape(40, 5120, 5120, 5120, 13824, 32000),
    r"llama-2-70b": Shape(80, 8192, 8192, 1024, 28672, 32000),
    r"mistral-7b": Shape(32, 4096, 4096, 1024, 14336, 32000),
    r"mistral-small-24b": Shape(40, 5120, 4096, 1024, 32768, 131072),
    r"mixtral-8x7b": Shape(32, 4096, 4096, 1024, 14336, 32000, experts=8, active=2),
    r"qwen2\.5-0\.5b": Shape(24, 896, 896, 128, 4864, 151936, tied=True),
    r"qwen2\.5-3b": Shape(36, 2048, 2048, 256, 11008, 151936, tied=True),
    r"qwen2\.5-7b": Shape(28, 3584, 3584, 512, 18944, 152064),
    r"qwen2\.5-14b": Shape(48, 5120, 5120, 1024, 13824, 152064),
    r"qwen2\.5-32b": Shape(64, 5120, 5120, 1024, 27648, 152064),
    r"qwen2\.5-72b": Shape(80, 8192, 8192, 1024, 29568, 152064),
    r"qwen3-0\.6b": Shape(28, 1024, 2048, 1024, 3072, 151936, tied=True, qk_norm=True),
    r"qwen3-4b": Shape(36, 2560, 4096, 1024, 9728, 151936, tied=True, qk_norm=True),
    r"qwen3-14b": Shape(40, 5120, 5120, 1024, 17408, 151936, qk_norm=True),
    r"qwen3-30b-a3b": Shape(48, 2048, 4096, 512, 768, 151936, qk_norm=True, experts=128, active=8),
    r"qwen3-235b-a22b": Shape(
        94, 4096, 8192, 512, 1536, 151936, qk_norm=True, experts=128, active=8
    ),
    r"yi-34b": Shape(60, 7168, 7168, 1024, 20480, 64000),
    r"apertus-8b": Shape(32, 4096, 4096, 1024, 21504, 131072, gated=False, qk_norm=True),
    r"gemma-2b": Shape(18, 2048, 2048, 256, 16384, 256000, tied=True),
    r"gemma-7b": Shape(28, 3072, 4096, 4096, 24576, 256000, tied=True),
    r"gemma-2-2b": Shape(26, 2304, 2048, 1024, 9216, 256000, tied=True),
}


def shape_by_name(name: str) -> Shape | None:
    """The shape of a model on the hub by its name, `ORG/NAME`; None where no published one is
    called so."""
    bare = name.rsplit("/", 1)[-1].lower()
    found = (shape for known, shape in SHAPES.items() if re.match(rf"(meta-)?{known}(?!\w)", bare))
    return next(found, None)
