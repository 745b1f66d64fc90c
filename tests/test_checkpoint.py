"""Checkpoints: the same bits come back on any mesh and on none; what cannot be read is one clear line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curia_common
from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, saving, sharding
from curia_jax.checkpoint import Meta

CONFIG = {"seed": 3, "data": {"canvas": None, "split": "train"}, "model": {"size": "Ti", "image_size": [16, 24]}}
DATASET = checkpoint.Dataset("abc", additions=1, slices=48, split="train")
SPECS = {"kernel": P("fsdp", None), "bias": P()}
ROOT = Path(__file__).resolve().parents[1]


def host_state(width: int = 16, step: int = 8) -> Any:
    """Random finite parameters, subnormal ones and -0 among them, with AdamW's moments."""
    random = np.random.default_rng(step)
    bits = random.integers(0, 2**32, (8, width), dtype=np.uint32) & 0xBFFFFFFF  # an exponent below that of infinity
    params = {"layer": {"kernel": bits.view(np.float32), "bias": np.linspace(-0.0, 1e-40, width, dtype=np.float32)}}
    adam = optax.ScaleByAdamState(
        np.int32(step),
        jax.tree.map(lambda x: x * np.float32(0.5), params),
        jax.tree.map(lambda x: np.abs(x) + 1, params),
    )
    return {"step": np.int32(step), "params": params, "opt_state": (adam, optax.EmptyState())}


def placed(state: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, SPECS.get(getattr(path[-1], "key", ""), P()))),
        state,
    )


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), jax.tree_util.keystr(path)


def save(workdir: Path, *steps: int, width: int = 16, mesh: dict[str, int] | None = None, **settings: Any) -> None:
    checkpointer = saving.Checkpointer(str(workdir), **settings)
    for step in steps:
        state = placed(host_state(width, step), sharding.make_mesh(**(mesh or {"data": 2, "fsdp": 4})))
        checkpointer.save(step, state, Meta(CONFIG, step * 2**40, DATASET, 5))
    checkpointer.close()


def restore(workdir: Path, wanted: Any) -> Any:
    checkpointer = saving.Checkpointer(str(workdir))
    try:
        return checkpointer.restore(wanted)
    finally:
        checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the steps 4 and 8, saved from the mesh (data 2, fsdp 4). Not to be written to."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 4, 8)
    return workdir


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(saved, tmp_path / "run")
    yield tmp_path / "run"


# ---- save and restore


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 8}, {"replica": 2, "data": 4}, None])
def test_restore_returns_every_bit_on_any_mesh(saved: Path, mesh: dict[str, int] | None) -> None:
    devices = jax.devices() if mesh else jax.devices()[:1]
    wanted = placed(host_state(), sharding.make_mesh(**(mesh or {}), devices=devices))
    state = restore(saved, abstract(wanted))
    assert_same_bits(state, wanted)
    for found, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert found.sharding == leaf.sharding
    assert checkpoint.latest(str(saved)) == (8, Meta(CONFIG, 8 * 2**40, DATASET, 5, step=8))


def test_load_needs_no_accelerator_and_no_mesh(saved: Path, tmp_path: Path) -> None:
    program = """
import sys
import jax
import numpy as np
from curia_jax import checkpoint
assert jax.device_count() == 1
loaded = checkpoint.load(sys.argv[1])
assert all(type(leaf) is np.ndarray for leaf in loaded.params["layer"].values())
np.savez(sys.argv[2], **loaded.params["layer"])
print(loaded.step, loaded.examples_seen, loaded.config["model"]["image_size"], loaded.path)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved), str(tmp_path / "params.npz")],
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"8 {8 * 2**40} [16, 24] {saved}/checkpoints/8"
    with np.load(tmp_path / "params.npz") as found:
        assert_same_bits(dict(found), host_state()["params"]["layer"])


def test_meta_on_disk_is_json(saved: Path) -> None:
    assert json.loads((saved / "checkpoints/8/meta/data.json").read_text()) == {
        "config": CONFIG,
        "examples_seen": 8 * 2**40,
        "dataset": {"fingerprint": "abc", "additions": 1, "slices": 48, "split": "train"},
        "dataset_start": 5,
        "step": 8,
        "step_examples": None,
        "skipped": [],
        "metrics": {},
        "origin": None,
        "version": curia_common.__version__,
    }


def test_meta_of_an_old_checkpoint_has_no_dataset_and_no_version(copy: Path) -> None:
    (copy / "checkpoints/8/meta/data.json").write_text(json.dumps({"config": CONFIG, "examples_seen": 7}))
    (copy / "checkpoints/8/digests.json").unlink()
    assert checkpoint.latest(str(copy)) == (8, Meta(CONFIG, 7, None, 0, version=None))
    assert checkpoint.load(str(copy)).examples_seen == 7


# ---- finding checkpoints


def test_find_takes_any_folder_of_a_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    for path, step, name in [
        (saved, None, "8"), (saved, 4, "4"), (saved / "checkpoints", None, "8"), (saved / "checkpoints/4", None, "4"),
        (saved / "checkpoints/4", 4, "4"), (saved.name, 4, "4"),
    ]:  # fmt: skip
        assert str(checkpoint.find(str(path), step)) == f"{saved}/checkpoints/{name}"
    assert checkpoint.load(str(saved), 4).examples_seen == 4 * 2**40


@pytest.mark.parametrize(
    ("path", "step", "message"),
    [
        ("nowhere", None, "no checkpoint at .*/nowhere: there is no such folder"),
        ("", 5, "no checkpoint of step 5 in .*; there are: 4, 8"),
        ("checkpoints/4", 8, "/4 is the checkpoint of step 4, not of 8; leave --step out or name the work directory"),
        ("checkpoints/4/state", None, "no finished checkpoint in .*; a work directory of curia_jax.pretrain has some"),
        ("checkpoints/4/_CHECKPOINT_METADATA", None, "no finished checkpoint in "),
    ],
)
def test_find_of_a_missing_checkpoint_is_one_line(saved: Path, path: str, step: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        checkpoint.find(str(saved / path), step)
    assert "\n" not in str(error.value)


def test_half_written_checkpoints_are_ignored_and_overwritten(copy: Path) -> None:
    """A killed save leaves its temporary folder, an interrupted copy a folder without the file that is written last."""
    steps = copy / "checkpoints"
    shutil.copytree(steps / "8", steps / "12")
    (steps / "12/commit_success.txt").unlink()
    shutil.copytree(steps / "8", steps / "16.orbax-checkpoint-tmp")
    assert checkpoint.find(str(copy)).name == "8"
    with pytest.raises(UserError, match="there are: 4, 8"):
        checkpoint.find(str(copy), 12)
    with pytest.raises(UserError, match="no finished checkpoint in"):
        checkpoint.find(str(steps / "12"))
    wanted = placed(host_state(), sharding.make_mesh())
    assert int(restore(copy, abstract(wanted))["step"]) == 8
    assert checkpoint.latest(str(copy)) == (8, Meta(CONFIG, 8 * 2**40, DATASET, 5, step=8))
    save(copy, 12)
    assert checkpoint.load(str(copy)).examples_seen == 12 * 2**40


def test_new_work_directory_has_no_checkpoint(tmp_path: Path) -> None:
    checkpointer = saving.Checkpointer(str(tmp_path / "new"))
    assert checkpointer.latest_step is None and checkpoint.latest(str(tmp_path / "new")) is None
    checkpointer.close()
    (tmp_path / "new").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no finished checkpoint in .*/new; a work directory"):
        checkpoint.find(str(tmp_path / "new"))


# ---- damage


def files_of(folder: Path) -> list[str]:
    """Without the empty file by which Orbax recognises a checkpoint: only its name says something."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def flip_one_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << (at % 8)
    path.write_bytes(content)


def flip_in_the_middle(path: Path) -> None:
    flip_one_bit(path, path.stat().st_size // 2)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage", [flip_in_the_middle, truncate, Path.unlink, lambda path: path.write_bytes(b"")],
    ids=["flipped", "truncated", "missing", "emptied"],
)  # fmt: skip
def test_damage_to_any_file_is_found_and_the_older_checkpoint_used(
    copy: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever of its files is damaged; step 4 stays whole."""
    caplog.set_level("INFO", logger="curia")
    newest, whole = copy / "checkpoints/8", copy.parent / "whole"
    shutil.copytree(newest, whole)
    names = files_of(newest)
    assert len(names) > 8
    for name in names:
        damage(newest / name)
        caplog.clear()
        step, meta = checkpoint.latest(str(copy)) or pytest.fail("no checkpoint")
        loaded = checkpoint.load(copy)
        if (
            name == "digests.json" and damage is Path.unlink
        ):  # as after a kill before it was written: the arrays are read
            assert (step, loaded.step) == (8, 8) and "has no digests: not checked" in caplog.text
        else:
            assert (step, loaded.step) == (4, 4), name
            assert "checkpoints/8" in caplog.text and "skipped" in caplog.text, name
            assert_same_bits(loaded.params, host_state(step=4)["params"])
        assert meta.examples_seen == step * 2**40
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert checkpoint.load(copy).step == 8


def test_every_flipped_bit_of_the_arrays_is_found(copy: Path) -> None:
    newest = copy / "checkpoints/8"
    data = [newest / name for name in files_of(newest) if "/d/" in name]
    for path in data:
        for at in np.random.default_rng(0).integers(0, path.stat().st_size, 20):
            flip_one_bit(path, int(at))
            assert checkpoint.check(newest).problem == f"{path.relative_to(newest)} has other bytes than were saved"
            flip_one_bit(path, int(at))
    assert checkpoint.check(newest) == (str(newest), None, True)


def test_hosts_share_the_work_and_together_find_any_damage(copy: Path) -> None:
    newest = copy / "checkpoints/8"
    for name in files_of(newest):
        if name == "digests.json":
            continue
        flip_in_the_middle(newest / name)
        problems = [checkpoint.check(newest, part=host, parts=3).problem for host in range(3)]
        assert any(problems), name
        if "data.json" not in name and "commit" not in name:
            assert sum(problem is not None for problem in problems) == 1, name  # each file is read by one host
        flip_in_the_middle(newest / name)


def test_without_a_whole_checkpoint_all_problems_are_one_line(copy: Path) -> None:
    (copy / "checkpoints/8/meta/data.json").write_text('{"config": {"se')
    (copy / "checkpoints/4/state/_METADATA").unlink()
    for read in (lambda: checkpoint.latest(str(copy)), lambda: checkpoint.load(copy)):
        with pytest.raises(DataError) as error:
            read()
        assert re.fullmatch(
            "no checkpoint in .* is whole: .*checkpoints/8: Unterminated string .*; .*checkpoints/4: state/_METADATA is missing; "
            "copy one of them again",
            str(error.value),
        )
    with pytest.raises(DataError, match=r"no checkpoint in .* is whole: .*checkpoints/4: state/_METADATA is missing"):
        checkpoint.load(copy, 4)


def test_examine_lists_whole_damaged_and_unfinished_checkpoints(copy: Path) -> None:
    flip_in_the_middle(copy / "checkpoints/8/state/_METADATA")
    shutil.copytree(copy / "checkpoints/4", copy / "checkpoints/12")
    (copy / "checkpoints/12/commit_success.txt").unlink()
    found = [(Path(path).name, problem, checked) for path, problem, checked in checkpoint.examine(str(copy))]
    assert found == [
        ("8", "state/_METADATA has other bytes than were saved", True),
        ("4", None, True),
        ("12", "it was not finished", False),
    ]


def test_checkpoint_of_an_earlier_version_is_read_with_a_warning(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="curia")
    for step in (4, 8):
        (copy / f"checkpoints/{step}/digests.json").unlink()
    assert checkpoint.load(copy).step == 8
    assert caplog.messages == [f"checkpoint {copy}/checkpoints/8 has no digests: not checked"]
    for path in (copy / "checkpoints/8/state").glob("ocdbt.process_0/d/*"):
        path.unlink()
    for path in (copy / "checkpoints/8/state").glob("d/*"):
        path.unlink()
    assert checkpoint.load(copy).step == 4  # what cannot be read is skipped without digests too


@pytest.mark.parametrize("name", ["best", "9"])
def test_step_folder_copied_elsewhere_loads_under_another_name(saved: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved / "checkpoints/4", tmp_path / name)
    if name == "best":
        assert checkpoint.load(folder).step == 4
        with pytest.raises(UserError, match="is the checkpoint of step 4, not of 8"):
            checkpoint.load(folder, 8)
    else:
        with pytest.raises(DataError, match="it holds step 4: its folder has to be called 4"):
            checkpoint.load(folder)


def test_state_of_another_step_than_its_folder_is_refused(copy: Path) -> None:
    """The arrays of step 8 under the name and the meta of step 4, with digests that fit."""
    folder = copy / "checkpoints/4"
    shutil.rmtree(folder / "state")
    shutil.copytree(copy / "checkpoints/8/state", folder / "state")
    (folder / "digests.json").unlink()
    with pytest.raises(DataError, match="says step 4, but its state has taken 8 steps"):
        checkpoint.load(folder)
    checkpointer = saving.Checkpointer(str(copy))
    wanted = abstract(placed(host_state(), sharding.make_mesh()))
    with pytest.raises(DataError, match=r"checkpoints/4 is damaged \(its state has taken 8 steps\)"):
        checkpointer.restore(wanted, step=4)
    checkpointer.close()


# ---- checkpoints that do not fit


def test_restore_of_another_model_size_is_one_line(saved: Path) -> None:
    wanted = placed(host_state(width=32), sharding.make_mesh())
    with pytest.raises(UserError) as error:
        restore(saved, abstract(wanted))
    message = str(error.value)
    assert message.startswith(
        f"checkpoint {saved}/checkpoints/8 does not fit this config's model (tensors that differ: 6): "
    )
    assert "params/layer/kernel is (8, 16) in the checkpoint, (8, 32) in the config" in message
    assert message.endswith("Use the config it was trained with, or another --workdir")
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bias", "scale", r"\(tensors that differ: 6\): .*params/layer/scale is not in the checkpoint"),
        ("", "scale", r"\(tensors that differ: 1\): params/layer/scale is not in the checkpoint"),
        ("bias", "", r"\(tensors that differ: 1\): params/layer/bias is in the checkpoint alone"),
    ],
)
def test_restore_names_missing_and_extra_tensors(saved: Path, old: str, new: str, message: str) -> None:
    state = host_state()
    trees = [state["params"]["layer"]]
    if old and new:  # another name everywhere
        trees += [moment["layer"] for moment in (state["opt_state"][0].mu, state["opt_state"][0].nu)]
    for tree in trees:
        leaf = tree.pop(old) if old else tree["bias"]
        if new:
            tree[new] = leaf
    with pytest.raises(UserError, match=message):
        restore(saved, abstract(placed(state, sharding.make_mesh())))
