"""YAML with file:line:column for every value; duplicate keys refused; layers merge and keep where
each value came from."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError

Path = tuple[Any, ...]  # keys and list indices from the root, e.g. ("checkpoint", "dir")

_ABSENT: Any = object()  # no layer below has anything there, so no origin either
MAX_BYTES = 4 * 1024 * 1024
MAX_VALUES = 50_000
MAX_DEPTH = 60
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OCTAL = re.compile(r"[-+]?0[0-7_]+", re.ASCII)
# YAML 1.1 reads 8e-6 as a string, because its floats need a dot; people who write it mean a number.
_FLOAT_WITHOUT_DOT = re.compile(r"[-+]?\d+[eE][-+]?\d+\Z", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """Where a value was written. `str()` gives `file:line:column`, counted from 1."""

    file: str
    line: int = 0
    column: int = 0
    # a plain scalar as it stands there: `yes`, where the value is True
    written: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Document:
    """Plain data, and the origin of each value (`origins`) and each key (`key_origins`) by its
    path."""

    data: Any
    origins: dict[Path, Origin] = field(default_factory=dict)
    key_origins: dict[Path, Origin] = field(default_factory=dict)
    name: str = ""
    raw: bytes = b""  # the very bytes, when it was one file
    problems: tuple[Problem, ...] = ()  # what is wrong with it as YAML, where that was tolerated

    def where(self, *path: Any) -> str:
        """`file:line:column` of the value at `path`, or of its nearest parent."""
        for length in range(len(path), -1, -1):
            origin = self.origins.get(path[:length])
            if origin:
                return str(origin)
        return self.name

    def where_key(self, *path: Any) -> str:
        """Like `where`, for the key itself."""
        origin = self.key_origins.get(path)
        return str(origin) if origin else self.where(*path)

    def get(self, *path: Any, default: Any = None) -> Any:
        """The value at `path`, or `default`."""
        node = self.data
        for key in path:
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and isinstance(key, int) and key < len(node):
                node = node[key]
            else:
                return default
        return node

    def section(self, *path: Any) -> Document:
        """The mapping at `path` with its positions, as a document of its own; empty where there is
        none."""
        data, depth = self.get(*path), len(path)

        def below(origins: Mapping[Path, Origin]) -> dict[Path, Origin]:
            return {key[depth:]: origin for key, origin in origins.items() if key[:depth] == path}

        return Document(
            data if isinstance(data, dict) else {},
            below(self.origins),
            below(self.key_origins),
            self.name,
        )


def load_yaml(path: str | os.PathLike[str], name: str = "", tolerate: bool = False) -> Document:
    """Read a YAML file; `name` is what messages call it (default: the path as given).

    Raises UsageError with every duplicate key, or the syntax error; EnvironmentFault when it cannot
    be read. With `tolerate` what does not hinder reading the rest is in the document's `problems`.
    """
    name = name or str(path)
    try:
        # Not opened before it is looked at: opening a FIFO waits for a writer.
        if not (stat.S_ISREG(os.stat(path).st_mode) or os.path.isdir(path)):
            raise UsageError(
                "not a plain file",
                where=name,
                hint="write it to a file, which is kept with the run",
            )
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EnvironmentFault(f"cannot read it: {error.strerror}", where=name) from error
    return dataclasses.replace(parse_yaml(raw, name, tolerate), raw=raw)


def parse_yaml(raw: bytes | str, name: str, tolerate: bool = False) -> Document:
    """Like `load_yaml`, from text."""
    if len(raw) > MAX_BYTES:
        raise UsageError(
            f"larger than {MAX_BYTES // 1024**2} MiB, which is no configuration file", where=name
        )
    text = raw
    if isinstance(raw, bytes):
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise UsageError(
                "not UTF-8 text",
                where=f"{name}:{line}:1",
                why=f"byte {error.start} is {raw[error.start]:#04x}",
            ) from error
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        detail = " ".join(filter(None, [error.context, error.problem]))
        raise UsageError(f"not valid YAML: {detail}", where=where) from error
    except yaml.reader.ReaderError as error:
        line = (
            str(text).count("\n", 0, error.position) + 1 if isinstance(error.position, int) else 0
        )
        raise UsageError(
            f"not valid YAML: character {error.character!r} is not allowed",
            where=f"{name}:{line}" if line else name,
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"not valid YAML: {error}", where=name) from error
    builder = _Builder(name)
    value = builder.build(root, (), 0, frozenset()) if root is not None else None
    if builder.problems and not tolerate:
        raise UsageError(builder.problems)
    problems = tuple(builder.problems)
    return Document(value, builder.origins, builder.key_origins, name, problems=problems)


def looks_like_float(value: object) -> bool:
    """Whether a string is a number in scientific notation that YAML 1.1 did not take for one
    (`8e-6`)."""
    return isinstance(value, str) and bool(_FLOAT_WITHOUT_DOT.match(value))


def merge(layers: Sequence[Document]) -> Document:
    """One document from layers, last wins: mappings merge key by key, everything else is replaced
    whole."""
    if len(layers) == 1:
        return layers[0]
    data: Any = {}
    origins: dict[Path, Origin] = {}
    key_origins: dict[Path, Origin] = {}
    for layer in layers:
        if layer.data is None:
            continue
        data = _merge_value(data, layer.data, (), layer, origins, key_origins)
    problems = tuple(problem for layer in layers for problem in layer.problems)
    name = layers[-1].name if layers else ""
    return Document(data, origins, key_origins, name, problems=problems)


def parse_set(assignments: Sequence[str]) -> Document:
    """The layer of `--set key.path=value` options; values are YAML. Raises UsageError for every bad
    one."""
    data: dict[str, Any] = {}
    origins: dict[Path, Origin] = {}
    key_origins: dict[Path, Origin] = {}
    problems: list[Problem] = []
    for text in assignments:
        key, equals, raw = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(
                Problem(
                    f"`--set {text}` is not `key.path=value`",
                    hint="for example --set config.train_iters=500",
                )
            )
            continue
        name = f"--set {key.strip()}"
        try:
            value = parse_yaml(raw, name).data
        except UsageError as error:
            problems.extend(error.problems)
            continue
        node = data
        for part in path[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                problems.append(Problem(f"`--set {key}` contradicts an earlier --set of `{part}`"))
                break
            node = child
        else:
            node[path[-1]] = value
            for sub_path, _ in walk(value):
                origins[path + sub_path] = Origin(name)
            for length in range(1, len(path)):
                key_origins.setdefault(path[:length], Origin(name))
    if problems:
        raise UsageError(problems)
    return Document(data, origins, {**key_origins, **origins}, "--set")


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value in a tree with its path, parents first."""
    yield path, value
    items = enumerate(value) if isinstance(value, list) else ()
    for key, child in value.items() if isinstance(value, dict) else items:
        yield from walk(child, (*path, key))


def _merge_value(
    base: Any,
    new: Any,
    path: Path,
    layer: Document,
    origins: dict[Path, Origin],
    key_origins: dict[Path, Origin],
) -> Any:
    if isinstance(base, dict) and isinstance(new, dict):
        merged = dict(base)
        if path in layer.origins:
            origins[path] = layer.origins[path]
        for key, value in new.items():
            child = (*path, key)
            if child in layer.key_origins:
                key_origins[child] = layer.key_origins[child]
            merged[key] = _merge_value(
                merged.get(key, _ABSENT), value, child, layer, origins, key_origins
            )
        return merged
    if base is not _ABSENT:
        for known in [known for known in origins if known[: len(path)] == path]:
            del origins[known]
    for sub_path, _ in walk(new, path):
        if sub_path in layer.origins:
            origins[sub_path] = layer.origins[sub_path]
        if sub_path in layer.key_origins:
            key_origins[sub_path] = layer.key_origins[sub_path]
    return new


class _Builder:
    """Turns PyYAML's node graph into plain data, noting positions and every duplicate key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.origins: dict[Path, Origin] = {}
        self.key_origins: dict[Path, Origin] = {}
        self.problems: list[Problem] = []
        self._constructor = yaml.constructor.SafeConstructor()

    def build(self, node: Any, path: Path, depth: int, parents: frozenset[int]) -> Any:
        origin = self._origin(node)
        self.origins[path] = (
            dataclasses.replace(origin, written=node.value)
            if isinstance(node, yaml.ScalarNode)
            else origin
        )
        if id(node) in parents or depth > MAX_DEPTH:
            raise UsageError(
                "nested too deeply, or an alias that contains itself", where=str(origin)
            )
        if len(self.origins) > MAX_VALUES:
            raise UsageError(
                f"more than {MAX_VALUES} values, aliases counted wherever they stand",
                where=str(origin),
            )
        parents = parents | {id(node)}
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth, parents)
        if isinstance(node, yaml.SequenceNode):
            return [
                self.build(child, (*path, index), depth + 1, parents)
                for index, child in enumerate(node.value)
            ]
        return self._scalar(node, origin)

    def _mapping(
        self, node: Any, path: Path, depth: int, parents: frozenset[int]
    ) -> dict[Any, Any]:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            # `<<: *anchor`: let PyYAML flatten it; keys written here win over merged ones.
            own = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
            try:
                self._constructor.flatten_mapping(node)
            except yaml.constructor.ConstructorError as error:
                mark = error.problem_mark or node.start_mark
                origin = Origin(self.name, mark.line + 1, mark.column + 1)
                self.problems.append(
                    Problem(f"`<<` cannot merge this: {error.problem}", where=str(origin))
                )
                return {}
            except RecursionError:
                self.problems.append(
                    Problem("`<<` merges a mapping into itself", where=str(self._origin(node)))
                )
                return {}
            node.value = _without_overridden(node.value, own)
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = (
                self._scalar(key_node, self._origin(key_node))
                if isinstance(key_node, yaml.ScalarNode)
                else None
            )
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(
                key, (str, int, float, bool)
            ):
                self.problems.append(
                    Problem("a key must be plain text", where=str(self._origin(key_node)))
                )
                continue
            if key in out:
                first = self.key_origins[path + (key,)]
                self.problems.append(
                    Problem(
                        f"key `{key}` is given twice",
                        where=str(self._origin(key_node)),
                        why=f"first given at {first}; YAML would silently keep only the last",
                        hint="delete one of them",
                    )
                )
                continue
            self.key_origins[path + (key,)] = self._origin(key_node)
            out[key] = self.build(value_node, (*path, key), depth + 1, parents)
        return out

    def _scalar(self, node: Any, origin: Origin) -> Any:
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self.problems.append(
                Problem(
                    f"tag `{node.tag}` is not allowed",
                    where=str(origin),
                    hint="plain YAML values only",
                )
            )
            return None
        if node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp"):
            return node.value  # a date is text here
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in node.value:
            # YAML 1.1 would read the duration 20:00:00 as the base-60 number 72000
            return node.value
        if node.tag == "tag:yaml.org,2002:int" and _OCTAL.fullmatch(node.value):
            plain, octal = (
                int(node.value.replace("_", "")),
                self._constructor.construct_object(node),
            )
            if plain != octal:
                why = (
                    f"a leading zero makes it the octal number {octal} in YAML 1.1, and {plain} in"
                    " YAML 1.2"
                )
                hint = f"write {plain}, or quote it where text is meant"
                self.problems.append(
                    Problem(f"`{node.value[:60]}` is ambiguous", str(origin), why, hint)
                )
            return octal
        try:
            return self._constructor.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self.problems.append(
                Problem(f"cannot read `{node.value[:60]}`: {error}", where=str(origin))
            )
            return None

    def _origin(self, node: Any) -> Origin:
        return Origin(self.name, node.start_mark.line + 1, node.start_mark.column + 1)


def _without_overridden(pairs: list[Any], own: set[str]) -> list[Any]:
    """Merged pairs stand first: those whose key the mapping itself has, and so has again later,
    go."""
    kept, later = [], set()
    for key, value in reversed(pairs):
        text = key.value if isinstance(key, yaml.ScalarNode) else None
        if text not in later or text not in own:
            kept.append((key, value))
        if text is not None:
            later.add(text)
    return kept[::-1]
