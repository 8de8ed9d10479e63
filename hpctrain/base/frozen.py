"""Frozen values that cost no start-up time: `@frozen` is `@dataclass(frozen=True)` to readers and type checkers.

`dataclass` compiles six methods for each class, 1 ms a class; the twenty classes on the way to `render` would be a tenth
of its CPU time (tools/bench startup). These share theirs instead. What they lack: inheritance of fields, `__post_init__`,
and the functions of `dataclasses` (`replace`, `asdict`); a class that needs those is an ordinary dataclass.
"""

from __future__ import annotations

from dataclasses import Field, FrozenInstanceError, field
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda function: function


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make `cls` a frozen value with the annotated fields: positional or keyword arguments, equality, hash and repr.

    The constructor raises TypeError for missing, unknown and repeated arguments, as a dataclass's does.
    """
    names = tuple(cls.__annotations__)
    declared = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
    factories: dict[str, Any] = {
        name: value.default_factory for name, value in declared.items() if isinstance(value, Field)
    }
    defaults = {name: value for name, value in declared.items() if name not in factories}
    for name in factories:
        delattr(cls, name)
    required = [name for name in names if name not in declared]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args))
        wrong = [key for key in kwargs if key in given or key not in names]
        given.update(kwargs)
        missing = [name for name in required if name not in given]
        if wrong or missing or len(args) > len(names):
            raise TypeError(f"{cls.__name__}(): missing {missing}, unknown or repeated {wrong}, {len(args)} positional")
        values = {**defaults, **{name: make() for name, make in factories.items() if name not in given}, **given}
        self.__dict__.update({name: values[name] for name in names})

    def __eq__(self: Any, other: object) -> bool:
        return bool(self.__dict__ == other.__dict__) if type(other) is type(self) else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self: Any) -> str:
        return f"{cls.__qualname__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    for method in (__init__, __eq__, __hash__, __repr__, __setattr__, __delattr__):
        setattr(cls, method.__name__, method)
    return cls


def __setattr__(self: Any, name: str, value: Any) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def __delattr__(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
