"""A folder appears whole or not at all, and only where nothing foreign is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from curia_common.errors import UserError
from curia_jax.convert import folder


def fill(target: Path, value: float = 1.0) -> None:
    content = {"model_type": "vit", folder.OWN: {"layout": "vit"}}
    tensors = {"norm.weight": np.full(3, value, np.float32)}
    folder.write(target, tensors=tensors, metadata={"step": "7"}, config=content, preprocessor={}, card="# A model\n")


def value_in(target: Path) -> float:
    return float(safetensors.numpy.load_file(target / "model.safetensors")["norm.weight"][0])


def test_files_are_complete_and_readable_by_others(tmp_path) -> None:
    with folder.publish(tmp_path / "deep" / "er" / "vit") as new:
        fill(new)
    output = tmp_path / "deep" / "er" / "vit"
    assert sorted(path.name for path in output.iterdir()) == sorted(folder.FILES)
    assert len({path.stat().st_mode & 0o777 for path in output.iterdir()}) == 1
    with safetensors.safe_open(output / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "curia_jax.step": "7"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_until_the_end_the_old_folder_is_untouched(tmp_path) -> None:
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
def test_whatever_interrupts_leaves_nothing_behind(error: type[BaseException], tmp_path) -> None:
    with pytest.raises(error), folder.publish(tmp_path / "deep" / "vit") as new:
        fill(new)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_a_users_error_and_the_old_folder_stays(tmp_path, monkeypatch) -> None:
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
        pytest.raises(UserError, match="cannot write .*vit: No space left on device"),
        folder.publish(output) as new,
    ):
        fill(new, 2.0)
    assert value_in(output) == 1.0 and [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_an_empty_folder_and_a_link_to_one_are_taken(tmp_path) -> None:
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
def test_folders_of_others_are_refused_and_kept(name: str, content: str, message: str, tmp_path) -> None:
    output = tmp_path / "vit"
    output.mkdir()
    (output / name).write_text(content)
    with pytest.raises(UserError, match=message), folder.publish(output) as new:
        fill(new)
    assert (output / name).read_text() == content and len(list(output.iterdir())) == 1


def test_what_somebody_added_to_our_folder_is_kept(tmp_path) -> None:
    output = tmp_path / "vit"
    with folder.publish(output) as new:
        fill(new)
    (output / "scores.csv").write_text("mine")
    (output / "probe").mkdir()
    with pytest.raises(UserError, match="holds probe and 1 more, which this command did not write"):
        folder.check_replaceable(output)


def test_what_appears_meanwhile_is_kept(tmp_path) -> None:
    output = tmp_path / "vit"
    with pytest.raises(UserError, match="holds scores.csv"), folder.publish(output) as new:
        fill(new)
        output.mkdir()
        (output / "scores.csv").write_text("mine")
    assert (output / "scores.csv").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path) -> None:
    (tmp_path / "vit").write_text("mine")
    with pytest.raises(UserError, match="vit is a file; name a folder with --output"):
        folder.check_replaceable(tmp_path / "vit")


def test_tensors_that_safetensors_would_garble_are_refused(tmp_path) -> None:
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    with pytest.raises(ValueError, match="weight is not C-contiguous"):
        folder.write(tmp_path, tensors={"weight": view}, metadata={}, config={}, preprocessor=None, card="")
