from pathlib import Path

from curia_jax.evaluate import backbones, features
from tests.evaluate.test_command import save_checkpoint


def test_work_directory_with_its_config_json_is_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_checkpoint(run)
    assert (run / "config.json").is_file() and (run / "checkpoints").is_dir()
    (opened,) = backbones.open_backbones([str(run)], [], readouts=[features.Readout(("mean",))])
    assert isinstance(opened, backbones.JaxBackbone)
    assert (opened.name, opened.provenance.step) == (str(run), 7)
