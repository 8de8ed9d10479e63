"""What a tokenization is: inputs as they are now, options, model, control tokens, and how the work
is cut into shards.

The same inputs and options give the same `key`, whatever the number of tasks that run the shards;
nothing here writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hpctrain.data.control import Control, ControlToken
from hpctrain.data.records import RecordForm
from hpctrain.data.sources import MAX_LINE_MIB, Input, Segment

FORMAT = 1


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the result, besides inputs and model.

    `encoder` decides only the speed, and `max_line_mib` only which lines are refused.
    """

    form: RecordForm = RecordForm()
    allow: tuple[str, ...] = ()
    on_error: str = "fail"
    max_errors: int = 0
    encoder: str = "auto"
    max_line_mib: int = MAX_LINE_MIB


@dataclass(frozen=True)
class Shard:
    """Consecutive segments that one worker turns into one piece of the output."""

    index: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs; `work_dir` holds the shards, `prefix` is the dataset's, without
    .bin."""

    prefix: str
    work_dir: str
    model_path: str
    model_sha256: str
    vocab_size: int
    control: Control
    options: Options
    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]

    @cached_property
    def content_key(self) -> str:
        """Names the result: other inputs, options or model have another. Paths, times and the
        number of shards do not matter."""
        options = {**asdict(self.options), "encoder": ""}
        del options["max_line_mib"]
        facts = {
            "format": FORMAT,
            "model": self.model_sha256,
            "control": asdict(self.control),
            "options": options,
            "inputs": [
                [source.kind, source.size, source.units, source.fingerprint]
                for source in self.inputs
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def key(self) -> str:
        """Names the shards' files: the content, and where it is cut."""
        shards = [[[s.input, s.begin, s.end] for s in shard.segments] for shard in self.shards]
        return hashlib.sha256((self.content_key + json.dumps(shards)).encode()).hexdigest()[:16]

    @property
    def dataset(self) -> str:
        """The finished dataset's prefix, as NeoX names it."""
        return self.prefix + "_text_document"


def cut(inputs: Sequence[Input], num_shards: int) -> tuple[Shard, ...]:
    """`num_shards` shards of about equal weight, in input order; .gz and .zst are never cut,
    parquet between row groups.

    Every unit of every input is in exactly one segment. Shards may be empty when there are few
    files that can be cut.
    """
    total = sum(source.weight for source in inputs)
    pieces: list[list[Segment]] = [[] for _ in range(num_shards)]
    before = 0
    for number, source in enumerate(inputs):
        for owner, begin, end in _owners(source, before, total, num_shards):
            pieces[owner].append(Segment(number, begin, end))
        before += source.weight
    return tuple(Shard(index, tuple(segments)) for index, segments in enumerate(pieces))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, what differs between two plans written with `to_json`, other than where the pieces
    are cut."""
    new = json.loads(json.dumps(new, ensure_ascii=True))  # tuples are lists in what was written
    out = _other_inputs(old.get("inputs", ()), new["inputs"])
    if old.get("model_sha256") != new["model_sha256"]:
        out.append(f"the model changed (`{old.get('model_path')}`, now `{new['model_path']}`)")
    for key in ("control", "options"):
        for name, value in new[key].items():
            was = old.get(key, {}).get(name)
            if was != value and name not in ("encoder", "max_line_mib", "forgeable"):
                out.append(f"{name.replace('_', ' ')} changed: {_short(was)}, now {_short(value)}")
    return out


def _other_inputs(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[str]:
    before = {source["path"]: source for source in old}
    after = {source["path"]: source for source in new}
    out = [f"input `{path}` is no longer given" for path in before if path not in after]
    for path, source in after.items():
        was = before.get(path)
        if was is None:
            out.append(f"input `{path}` is new")
        elif was["size"] != source["size"]:
            out.append(f"input `{path}` changed: {was['size']} bytes, now {source['size']}")
        elif was["fingerprint"] != source["fingerprint"]:
            out.append(f"input `{path}` changed: other content of the same size")
        elif was["mtime_ns"] != source["mtime_ns"]:
            out.append(f"input `{path}` was written again since")
    if not out and list(before) != list(after):
        out.append("the inputs are in another order")
    return out


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data, with its key; `from_json` gives the same plan back."""
    return {"format": FORMAT, "key": plan.key, "content_key": plan.content_key, **asdict(plan)}


def from_json(data: dict[str, Any]) -> Plan:
    """The plan that `to_json` wrote."""
    control = data["control"]
    return Plan(
        prefix=data["prefix"],
        work_dir=data["work_dir"],
        model_path=data["model_path"],
        model_sha256=data["model_sha256"],
        vocab_size=data["vocab_size"],
        control=Control(
            tuple(ControlToken(**token) for token in control["tokens"]),
            control["eod_piece"],
            control["eod_id"],
            tuple(control["forgeable"]),
        ),
        options=Options(
            **{
                **data["options"],
                "form": RecordForm(**data["options"]["form"]),
                "allow": tuple(data["options"]["allow"]),
            }
        ),
        inputs=tuple(Input(**source) for source in data["inputs"]),
        shards=tuple(
            Shard(shard["index"], tuple(Segment(**segment) for segment in shard["segments"]))
            for shard in data["shards"]
        ),
    )


def _owners(
    source: Input, before: int, total: int, num_shards: int
) -> Iterator[tuple[int, int, int]]:
    """(shard, begin, end) of the pieces of one input whose weight starts at `before` of `total`."""
    if not source.units:
        yield min(before * num_shards // total, num_shards - 1), 0, 0
        return
    first = min(before * num_shards // total, num_shards - 1)
    if source.kind in ("gz", "zst"):
        yield first, 0, source.units
        return
    begin = 0
    for owner in range(first, num_shards):
        # Shard `owner` ends at weight total * (owner + 1) / num_shards; rounded up, so that the
        # last one takes the rest.
        end = -(-(total * (owner + 1) // num_shards - before) * source.units // source.weight)
        end = source.units if owner == num_shards - 1 else max(begin, min(end, source.units))
        if end > begin:
            yield owner, begin, end
        begin = end
        if begin == source.units:
            return


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text if len(text) <= 80 else text[:77] + '...'}`"
