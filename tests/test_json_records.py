"""Records from JSON that may hold anything."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pytest

from curia_jax import json_records


class Place(NamedTuple):
    row: int
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Thing:
    count: int
    size: float
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, float] = (0, 0.0)
    names: tuple[str, ...] = ()
    shares: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    sure: bool = True


def test_record_has_tuples_and_records_of_its_types() -> None:
    text = """{"count": 3, "size": 1, "pair": [1, 2.5], "names": ["x"], "shares": {"k": null, "l": 0.5},
               "places": {"p": {"row": 4, "unknown": []}}, "sure": false, "unknown": 1}"""
    assert json_records.record(Thing, json_records.loads(text)) == Thing(
        3, 1, "a", (1, 2.5), ("x",), {"k": None, "l": 0.5}, {"p": Place(4)}, False
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "count is None"),
        ({"count": True}, "count is True"),
        ({"count": 1.5}, "count is 1.5"),
        ({"count": 10**5000}, "count is a number that is too large"),
        ({"size": math.nan}, "size is nan"),
        ({"size": "9" * 5000}, "size is '9999"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"kind": []}, "kind is a list of 0"),
        ({"pair": [1]}, "pair is a list of 1"),
        ({"names": "x"}, "names is 'x'"),
        ({"names": ["\ud800"]}, r"names is '\\ud800'"),
        ({"shares": {"k": []}}, "shares is a list of 0"),
        ({"places": {"p": {}}}, "it has no field row"),
        ({"sure": 1}, "sure is 1"),
    ],
)
def test_record_refuses_a_field_of_another_type_and_names_it(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        json_records.record(Thing, {"count": 1, "size": 1.0, **change})
    assert len(str(error.value)) < 100 and str(error.value).isprintable()


@pytest.mark.parametrize("content", [None, 5, [], "x", {}, {"count": 1}])
def test_record_refuses_what_is_no_object_or_lacks_a_field(content: Any) -> None:
    with pytest.raises(ValueError, match="an object is wanted|it has no field"):
        json_records.record(Thing, content)


def test_record_takes_infinity_and_nan_only_where_told() -> None:
    content = json_records.loads('{"count": 1, "size": Infinity}')
    assert json_records.record(Thing, content, finite=False).size == math.inf
    with pytest.raises(ValueError, match="count is nan"):
        json_records.record(Thing, {"count": math.nan, "size": 1.0}, finite=False)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe\xfd", "nul", "1" * 5000])
def test_loads_raises_value_error_whatever_is_wrong(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        json_records.loads(text)


def test_loads_reads_what_json_writes() -> None:
    content = {"a": [1, 2.5, None, True, "é"]}
    assert json_records.loads(json.dumps(content).encode()) == content
