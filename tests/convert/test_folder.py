"""A folder is published whole or not at all, and never replaces files of others."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from curia_common.errors import StorageError, UserError
from curia_jax.convert import folder


def fill(target: Path, value: float = 1.0) -> None:
    content = {"model_type": "vit", folder.OWN: {"layout": "vit"}}
    tensors = {"norm.weight": np.full(3, value, np.float32)}
    folder.write(target, tensors=tensors, metadata={"step": "7"}, config=content, preprocessor={}, card="# A model\n")


def value_in(target: Path) -> float:
    return float(safetensors.numpy.load_file(target / "model.safetensors")["norm.weight"][0])


def test_published_files_are_complete_and_share_permissions(tmp_path) -> None:
    with folder.publish(tmp_path / "deep" / "er" / "vit") as new:
        fill(new)
    output = tmp_path / "deep" / "er" / "vit"
    assert sorted(path.name for path in output.iterdir()) == sorted(
        set(folder.FILES) - {folder.ADAPTER_WEIGHTS, folder.ADAPTER_CONFIG}
    )
    assert len({path.stat().st_mode & 0o777 for path in output.iterdir()}) == 1
    with safetensors.safe_open(output / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "curia_jax.step": "7"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_publish_keeps_old_folder_until_the_end(tmp_path) -> None:
    output = tmp_path / "vit"
    with folder.publish(output) as new:
        fill(new, 1.0)
        assert not output.exists()
    with folder.publish(output) as new:
        fill(new, 2.0)
        assert value_in(output) == 1.0
    assert value_in(output) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UserError, ValueError])
def test_publish_leaves_nothing_after_exception(error: type[BaseException], tmp_path) -> None:
    with pytest.raises(error), folder.publish(tmp_path / "deep" / "vit") as new:
        fill(new)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_storage_error_and_keeps_old_folder(tmp_path, monkeypatch) -> None:
    output = tmp_path / "vit"
    with folder.publish(output) as new:
        fill(new)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(StorageError, match="cannot write .*vit: No space left on device"),
        folder.publish(output) as new,
    ):
        fill(new, 2.0)
    assert value_in(output) == 1.0 and [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_publish_replaces_empty_folder_behind_link(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with folder.publish(tmp_path / "link") as new:
        fill(new)
    assert (tmp_path / "link").is_symlink() and value_in(tmp_path / "real") == 1.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "mine", "holds notes.txt, which this command did not write"),
        ("config.json", json.dumps({"model_type": "vit"}), "did not write .its config.json has no key curia_jax"),
        ("config.json", "no json", "holds a model that this command did not write"),
        ("model.safetensors", "x", "holds a model that this command did not write"),
    ],
)
def test_publish_refuses_foreign_folder(name: str, content: str, message: str, tmp_path) -> None:
    output = tmp_path / "vit"
    output.mkdir()
    (output / name).write_text(content)
    with pytest.raises(UserError, match=message), folder.publish(output) as new:
        fill(new)
    assert (output / name).read_text() == content and len(list(output.iterdir())) == 1


def test_publish_refuses_folder_with_added_files(tmp_path) -> None:
    output = tmp_path / "vit"
    with folder.publish(output) as new:
        fill(new)
    (output / "scores.csv").write_text("mine")
    (output / "probe").mkdir()
    with pytest.raises(UserError, match="holds probe and 1 more, which this command did not write"):
        folder.check_replaceable(output)


def test_publish_keeps_files_written_meanwhile(tmp_path) -> None:
    output = tmp_path / "vit"
    with pytest.raises(UserError, match="holds scores.csv"), folder.publish(output) as new:
        fill(new)
        output.mkdir()
        (output / "scores.csv").write_text("mine")
    assert (output / "scores.csv").read_text() == "mine"


def test_signal_between_renames_restores_old_folder(tmp_path, monkeypatch) -> None:
    output = tmp_path / "vit"
    with folder.publish(output) as new:
        fill(new)
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt), folder.publish(output) as new:
        fill(new, 2.0)
    assert value_in(output) == 1.0 and [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_publish_refuses_file(tmp_path) -> None:
    (tmp_path / "vit").write_text("mine")
    with pytest.raises(UserError, match="vit is a file; name a folder with --output"):
        folder.check_replaceable(tmp_path / "vit")


def test_write_rejects_tensor_that_is_not_contiguous(tmp_path) -> None:
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    with pytest.raises(ValueError, match="weight is not C-contiguous"):
        folder.write(tmp_path, tensors={"weight": view}, metadata={}, config={}, preprocessor=None, card="")
