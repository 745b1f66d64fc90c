"""A few of the damaged and hostile files of benchmarks/fuzz_readers.py, and what it makes of readers that fail; `make fuzz` reads 20,000."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import fuzz_readers
from curia_common.errors import DataError


@pytest.mark.long
def test_readers_accept_or_refuse_damaged_files_in_one_line(tmp_path: Path) -> None:
    fuzz_readers.write_sound(tmp_path / "sound")
    plan = fuzz_readers.plan_of(400, tmp_path / "sound")
    outcome = fuzz_readers.run(tmp_path, plan, seed=11)
    assert outcome.problems() == []
    assert {name for _, name in plan} == set(outcome.counts)
    totals = [sum(counter[what] for counter in outcome.counts.values()) for what in ("accepted", "DataError")]
    assert sum(counter.total() for counter in outcome.counts.values()) == 400 and min(totals) > 50


def _refuse(text: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise DataError(text)

    return read


@pytest.mark.parametrize(
    ("read", "refusal", "problem"),
    [
        (lambda folder: None, None, None),
        (_refuse("x is damaged; copy it again"), "DataError", None),
        (_refuse("x is damaged\ncopy it again"), "DataError", "a message of 26 characters and 2 lines"),
        (_refuse("x" * 3000), "DataError", "a message of 3,000 characters and 1 lines"),
        (lambda folder: int("x"), None, "ValueError at test_fuzz_readers.py:"),
    ],
)
def test_fuzz_readers_names_what_a_reader_violates(
    read: Callable[[Path], object], refusal: str | None, problem: str | None, tmp_path: Path
) -> None:
    for place in ("sound", "work"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a").write_bytes(b"sound")
    target = fuzz_readers.Target("a", "", ("a",), (), read, 1)
    found = fuzz_readers.read(target, "a", b"damaged", tmp_path / "work", tmp_path / "sound")
    assert found.refusal == refusal
    assert found.problem is None if problem is None else str(found.problem).startswith(problem)
    assert (tmp_path / "work" / "a").read_bytes() == b"sound"  # for the next input


def test_fuzz_readers_refuses_a_reader_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_readers, "SECONDS", 0.01)
    (tmp_path / "a").write_bytes(b"sound")
    target = fuzz_readers.Target("a", "", ("a",), (), lambda folder: time.sleep(0.05), 1)
    assert fuzz_readers.read(target, "a", None, tmp_path, tmp_path).problem == "took 0 s"


def test_fuzz_readers_inputs_follow_from_the_seed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    target = fuzz_readers.Target("a", "", ("a",), (), lambda folder: None, 1)
    first, second, other = (
        [fuzz_readers.change(number, seed, target, tmp_path)[1] for number in range(20)] for seed in (5, 5, 6)
    )
    assert first == second != other
