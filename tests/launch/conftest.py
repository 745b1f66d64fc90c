"""Settings of the launcher's tests."""

import dataclasses

import pytest

from launch import checks, spec


@pytest.fixture(autouse=True)
def no_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config of a launch is not asked of the command, which takes a process; tests/launch/test_checks.py does that."""
    monkeypatch.setattr(checks, "parse_words", lambda spec: None)
    monkeypatch.setitem(spec.COMMANDS, "pretrain", dataclasses.replace(spec.COMMANDS["pretrain"], has_fields=False))
