from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory, run_phantom: Callable) -> Path:
    """All tasks, with 3 test patients each and pictures of 32 px. Tests must not change it."""
    folder = tmp_path_factory.mktemp("suite") / "curiabench"
    result = run_phantom("--suite=curiabench", "--output", folder, "--patients", 3, "--size", 32)
    assert result.code == 0, result.err
    return folder
