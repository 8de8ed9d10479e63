"""`@frozen` behaves as `@dataclass(frozen=True)` does, for all that hpctrain uses of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from hpctrain.base.frozen import frozen


def declare(decorator: Any) -> Any:
    class Point:
        x: int
        y: int = 2
        tags: dict = dataclasses.field(default_factory=dict)

        @property
        def total(self):
            return self.x + self.y

    Point.__qualname__ = "Point"
    return decorator(Point)


@frozen
class Whole:
    name: str
    parts: tuple[int, ...] = ()


@pytest.fixture(params=["frozen", "dataclass"])
def point(request):
    return declare(frozen if request.param == "frozen" else dataclasses.dataclass(frozen=True))


def test_arguments_defaults_and_fresh_containers(point):
    assert vars(point(1)) == {"x": 1, "y": 2, "tags": {}} and vars(point(1, y=5)) == {"x": 1, "y": 5, "tags": {}}
    assert point(1).tags is not point(1).tags and point(1).total == 3


@pytest.mark.parametrize(
    "args, kwargs", [((), {}), ((1, 2, {}, 4), {}), ((1,), {"x": 2}), ((1,), {"z": 2}), ((), {"y": 2})]
)
def test_wrong_arguments_are_type_errors(point, args, kwargs):
    with pytest.raises(TypeError):
        point(*args, **kwargs)


def test_values_never_change(point):
    value = point(1)
    for change in (lambda: setattr(value, "x", 2), lambda: setattr(value, "new", 2), lambda: delattr(value, "x")):
        with pytest.raises(AttributeError):
            change()

    assert vars(value) == {"x": 1, "y": 2, "tags": {}}


def test_equality_and_repr(point):
    assert point(1) == point(1, 2) and point(1) != point(2) and point(1) != (1, 2, {})
    assert repr(point(1)) == "Point(x=1, y=2, tags={})"


def test_hash_pickle_and_copy():
    value = Whole("a", (1, 2))

    assert {value: 1}[Whole("a", (1, 2))] == 1
    assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)
