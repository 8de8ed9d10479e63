"""prove_verl.py CONFIG VECTORS OVERRIDES…: hydra reads every vector back, and verl's own
configuration every rendered override.

Run by tools/prove-verl in an environment with hydra; CONFIG is the folder trainer/config of a verl.
"""

from __future__ import annotations

import json
import sys

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf


def main(config: str, vectors: str, *files: str) -> None:
    parser = OverridesParser.create()
    with open(vectors, encoding="utf-8") as stream:
        pairs = json.load(stream)["vectors"]
    for value, word in pairs:
        read = OmegaConf.to_container(
            OmegaConf.create({"a": parser.parse_override(word).value()}), resolve=True
        )["a"]
        assert read == value and type(read) is type(value), (value, word, read)
    print(f"{len(pairs)} values are read back as they were")
    for path in files:
        with open(path, encoding="utf-8") as stream:
            words = [
                line.rstrip("\n")
                for line in stream
                if line[:1] != "#" and not line.startswith("hydra.")
            ]
        with initialize_config_dir(config_dir=config, version_base=None):
            composed = compose(config_name="ppo_trainer", overrides=words)
        OmegaConf.resolve(composed)  # as verl does
        last = {one.key_or_group: one.value() for one in parser.parse_overrides(words)}
        for key, value in last.items():
            found = OmegaConf.select(composed, key)
            found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
            assert found == (value.text if isinstance(value, QuotedString) else value), (
                path,
                key,
                value,
                found,
            )
        print(
            f"{path}: verl's configuration takes all {len(last)} keys and gives back their values"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
