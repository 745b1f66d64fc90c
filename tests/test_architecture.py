"""The arrows of the house: which package may import which, what a command may import at its top, one home for each thing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("curia_common", "data_pipeline", "curia_jax", "configs", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
COMMANDS = sorted(path for path in FILES if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("__init__", "__main__"))


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports; `from a import b` counts as a.b where that is a module and as a otherwise."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = ROOT / node.module.replace(".", "/") / alias.name
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


OWN = PACKAGES
# Who may import what of ours. The longest prefix that matches a file decides.
ALLOWED = {
    "curia_common": ("curia_common",),
    "launch": ("launch", "curia_common"),
    "data_pipeline": ("data_pipeline", "curia_common"),
    "data_pipeline.format": ("data_pipeline.format", "curia_common"),
    "data_pipeline.sources": ("data_pipeline.sources", "data_pipeline.format", "curia_common"),
    "curia_jax": ("curia_jax", "data_pipeline.format", "curia_common"),
    "curia_jax.demo": ("curia_jax", "data_pipeline", "curia_common"),
    "curia_jax.predict": ("curia_jax", "data_pipeline", "curia_common"),
    "curia_jax.models": ("curia_jax.models",),
    "configs": ("curia_jax.configs",),
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    module = module_of(path)
    rule = max((prefix for prefix in ALLOWED if within(module, prefix)), key=len)
    wrong = [name for name in imports_of(path) if within(name, *OWN) and not within(name, *ALLOWED[rule])]
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}; {rule} may import {', '.join(ALLOWED[rule])}"


@pytest.mark.parametrize("package", ["curia_common", "data_pipeline", "launch"])
def test_only_curia_jax_imports_jax(package: str) -> None:
    wrong = [
        module_of(path)
        for path in (ROOT / package).rglob("*.py")
        if any(within(name, "jax", "flax", "optax", "orbax") for name in imports_of(path))
    ]
    assert not wrong


def test_nothing_imports_a_command() -> None:
    commands = {module_of(path) for path in COMMANDS}
    wrong = [
        f"{module_of(path)} imports {name}"
        for path in FILES
        for name in imports_of(path)
        if name.removesuffix(".__main__") in commands and module_of(path) not in commands
        # A package whose command is its __main__ may be imported; the command itself may not.
        if name.endswith(".__main__") or not (ROOT / name.replace(".", "/")).is_dir()
    ]
    assert not wrong


@pytest.mark.parametrize("path", COMMANDS, ids=module_of)
def test_commands_import_nothing_heavy_at_their_top(path: Path) -> None:
    module = module_of(path) + (".__main__" if path.name == "__main__.py" else "")
    heavy = "numpy", "jax", "pydicom", "SimpleITK", "gdcm", "scipy", "PIL", "pyarrow", "rich", "tensorflow_datasets"
    program = f"import sys, {module}\nprint(*[name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_untyped_dicts_stay_at_the_borders() -> None:
    words = ("dict[str, Any]", "Mapping[str, Any]", "dict[str, object]", "Mapping[str, object]")
    counts = {
        module_of(path): sum(path.read_text(encoding="utf-8").count(word) for word in words)
        for path in FILES
        if within(module_of(path), "curia_jax", "data_pipeline")
    }
    assert sum(counts.values()) < 80, {name: n for name, n in counts.items() if n}
    assert not sum(path.read_text(encoding="utf-8").count("dict[str, object]") for path in FILES)


# Modules without behaviour of their own, and those whose tests have another name.
UNTESTED = {
    "curia_jax/report/style.py": "constants",
    "data_pipeline/sources/base.py": "the contract that test_readers.py checks of every reader",
}


def test_every_module_has_a_test_file_at_its_place_in_the_tree() -> None:
    missing = []
    for path in [*FILES, *(ROOT / "benchmarks").glob("*.py")]:
        place = path.relative_to(ROOT)
        if path.stem == "__init__" or place.parts[0] == "configs" or str(place) in UNTESTED:
            continue
        inside = place.relative_to("curia_jax") if place.parts[0] == "curia_jax" else place
        name = "command" if path.stem == "__main__" else path.stem
        if not (ROOT / "tests" / inside.parent / f"test_{name}.py").exists():
            missing.append(str(place))
    assert not missing, f"no test file for {', '.join(missing)}"
