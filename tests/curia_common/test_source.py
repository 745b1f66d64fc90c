"""Which code is said to run."""

import subprocess
from pathlib import Path

import pytest

from curia_common import __version__, source


def test_checkout_is_named_by_its_commit_and_whether_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]
    assert source.describe() == commit
    (tmp_path / "a.py").write_text("2")
    assert source.describe() == f"{commit}-dirty"


def test_image_is_named_by_the_commit_that_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.setenv("CURIA_REVISION", "0123456789ab")
    assert source.describe() == "0123456789ab"
    monkeypatch.delenv("CURIA_REVISION")
    assert source.describe() == __version__
