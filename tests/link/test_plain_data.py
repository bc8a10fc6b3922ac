"""Dataclasses survive the way over the link by the types of their fields; a value of another type is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layertap_server.link.plain_data import from_json, layout, readers, to_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


class Color(IntEnum):
    RED = 1
    BLUE = 3


@dataclass(frozen=True, slots=True)
class Inner:
    number: int
    pairs: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Outer:
    color: Color
    colors: Color | tuple[Color, ...] | None
    is_it: bool
    share: float
    inner: Inner | None
    several: tuple[Inner, ...]
    deep: tuple[tuple[tuple[int, ...], ...], ...]
    mixed: tuple[int, str, bool]
    names: Mapping[str, tuple[str, ...]]
    anything: Mapping[str, Any]
    derived: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", len(self.several))


ONE = Outer(
    color=Color.BLUE,
    colors=(Color.RED, Color.BLUE),
    is_it=True,
    share=0.5,
    inner=Inner(2**40, ((1, 2), (3, 4))),
    several=(Inner(1), Inner(-2, ())),
    deep=(((1,), ()), ((2, 3),)),
    mixed=(1, "a", False),
    names={"a": ("b", "c")},
    anything={"a": [1, {"b": None}]},
)


def on_the_wire(value: Any) -> Any:
    return json.loads(json.dumps(to_json(value)))


@pytest.mark.parametrize("one", [ONE, replace(ONE, colors=Color.RED, inner=None), replace(ONE, colors=None)])
def test_all_kinds_of_fields_survive(one: Outer) -> None:
    again = from_json(Outer, on_the_wire(one))
    assert again == one
    assert type(again.color) is Color
    assert again.derived == 2


WRONG = {
    "another enum number": ("color", 2),
    "a bool for a number": ("color", True),
    "a number for a bool": ("is_it", 1),
    "a float for a number": ("inner", [1.0, None]),
    "None": ("color", None),
    "a field too few": ("inner", [1]),
    "a field too many": ("inner", [1, None, 2]),
    "an element too many": ("mixed", [1, "a", False, 2]),
    "an element of another type": ("deep", [[[1], ["a"]]]),
    "a pair of three": ("inner", [1, [[1, 2, 3]]]),
    "no object": ("inner", {"number": 1}),
    "no number": ("share", float("nan")),
    "a large number": ("inner", [2**63, None]),
    "text in a mapping": ("names", {"a": "b"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_refused(name: str) -> None:
    changed, value = WRONG[name]
    data = on_the_wire(ONE)
    data[list(Outer.__dataclass_fields__).index(changed)] = value
    with pytest.raises((TypeError, ValueError)):
        from_json(Outer, data)


@given(data=JSON, at=st.integers(0, 9))
def test_any_json_is_an_object_or_refused(data: Any, at: int) -> None:
    whole = on_the_wire(ONE)
    whole[at] = data
    for some in (data, whole):
        try:
            one = from_json(Outer, some)
        except (TypeError, ValueError):
            continue
        assert from_json(Outer, on_the_wire(one)) == one


@pytest.mark.parametrize(
    "hint", [set[int], bytes, object, int | Color, tuple[int, ...] | Inner, Mapping[int, str], list[int]]
)
def test_a_type_that_cannot_travel_is_known_before_it_is_used(hint: Any) -> None:
    with pytest.raises(TypeError):
        readers(hint)


def test_the_layout_changes_with_names_and_types_at_any_depth() -> None:
    @dataclass(frozen=True)
    class Renamed:
        count: int
        pairs: tuple[tuple[int, int], ...] | None = None

    @dataclass(frozen=True)
    class Longer:
        number: int
        pairs: tuple[tuple[int, ...], ...] | None = None

    assert layout(Inner) == layout(Inner)
    found = {layout(tuple[kind, ...] | None) for kind in (Inner, Renamed, Longer)}  # type: ignore[valid-type]
    assert len(found) == 3
