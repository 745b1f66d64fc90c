"""Records of the runs that were launched from this machine."""

from pathlib import Path

import pytest

from curia_common.errors import UserError
from launch import __main__ as command
from launch import records
from launch import spec as specs
from tests.launch.clouds import spec_of


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_name_of_another_target_is_refused_and_its_record_kept() -> None:
    first = spec_of("gke", "v5e:4x4")
    records.write(first)
    with pytest.raises(UserError, match=r"run first was launched on gke .* --run=NAME"):
        records.write(spec_of("slurm", "gpu:2x8"))
    assert records.read("first") == first


def test_name_of_a_build_into_another_folder_is_refused() -> None:
    def build(output: str) -> specs.LaunchSpec:
        return specs.make(target="local", topology="cpu:1x1", command=["build", "--input=a", f"--output={output}"])

    records.write(build("/a/shards"))
    records.write(build("/a/shards"))
    with pytest.raises(UserError, match="run shards was launched on local with /a/shards; give this one another name"):
        records.write(build("/b/shards"))


def test_damaged_record_is_named(capsys) -> None:
    folder = records.folder_of("first")
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text("{}")
    assert command.main(["status", "first"]) == 2
    assert "spec.json is damaged (KeyError); launch the run again" in capsys.readouterr().err.splitlines()[-1]
    assert command.main(["status", "firs"]) == 2
    assert "the nearest of 1 are: first" in capsys.readouterr().err.splitlines()[-1]
