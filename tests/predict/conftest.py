"""Exams, the dataset that a build makes of them, and a classifier to predict with."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from curia_jax.convert import __main__ as convert
from curia_jax.models.head import HeadConfig
from curia_jax.predict import __main__ as predict
from data_pipeline import build, synthetic_exams, workers
from tests.convert import fine_tuned

KEY = "a key that everybody may know"
HEAD = HeadConfig("linear", "cls", "classes", ("none", "one", "many"))


class Result(NamedTuple):
    """What the command left: exit code and both streams."""

    code: int
    out: str
    err: str


def inline(function: workers.Work, tasks: list[Any], **unused: Any) -> Iterator[workers.Done]:
    """The work of the worker processes in this one, which spares seconds of starting them."""
    for number, task in enumerate(tasks):
        yield workers.Done(number, function(task, {}, lambda item: None))


@pytest.fixture(scope="session")
def key_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("key") / "site.key"
    path.write_text(KEY + "\n")
    return path


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """DICOM folders of 2 patients: 8 series of 5 slices, 40 px."""
    folder = tmp_path_factory.mktemp("phantom")
    synthetic_exams.write_study(folder, patients=2, seed=3, size=40, slices=5)
    return folder / "dicom"


@pytest.fixture(scope="session")
def dataset(study, key_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset") / "out"
    words = ["--input", study, "--output", folder, "--key-file", key_file, "--workers", 1, "--test", 0.5]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(workers, "run", inline)
        assert build.main([str(word) for word in words]) == 0
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """An export of a classifier of single slices."""
    folder = tmp_path_factory.mktemp("weights") / "classifier"
    assert convert.main([f"--checkpoint={fine_tuned.run(HEAD)}", f"--output={folder}", "--layout=vit_classifier"]) == 0
    return folder


@pytest.fixture
def run(weights, key_file, monkeypatch) -> Callable[..., Result]:
    """(input, output, further words) -> the command, with the tests' key."""
    monkeypatch.setattr(workers, "run", inline)

    def call(given: Path, output: Path, *words: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        usual = [f"--weights={weights}", f"--input={given}", f"--output={output}", f"--key-file={key_file}"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = predict.main([*usual, *words])
        return Result(code, out.getvalue(), err.getvalue())

    return call
