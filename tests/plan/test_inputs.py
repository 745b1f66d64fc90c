"""What a run needs of its input, and what shards say about it."""

from pathlib import Path

import pytest

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax.plan import inputs, topologies

V5E = topologies.parse("v5e:16x16")
TINY = str(Path(__file__).resolve().parents[1] / "configs" / "tiny.py")


def facts(loader_per_core: float | None) -> inputs.InputFacts:
    return inputs.InputFacts(1000, False, (512, 512), 60_000.0, loader_per_core)


@pytest.mark.parametrize(("rate", "available", "suffices"), [(10.0, 1120, True), (8.0, 896, False), (None, None, None)])
def test_input_needs_compare_hosts_with_the_measured_loader(rate, available, suffices):
    needs = inputs.input_needs(64_000.0, V5E, facts(rate))
    assert needs.hosts == 64
    assert needs.host_images_per_second_needed == 1000
    assert needs.storage_bytes_per_second_needed == 3.84e9
    assert (needs.host_images_per_second_available, needs.input_suffices) == (available, suffices)


def test_input_facts_come_from_shards(tiny_shards: Path):
    config = configs.load(TINY, [f"--config.data.shards={tiny_shards}"])
    found = inputs.input_facts(config, None)
    assert (found.examples, found.examples_assumed) == (48, False)
    assert found.loader_per_core is not None and found.loader_per_core > 0
    stored = sum(file.stat().st_size for file in tiny_shards.glob("*array_record*"))
    assert found.bytes_per_image == pytest.approx(stored / 48)
    assert inputs.input_facts(config, 7).examples == 7


def test_input_facts_of_a_mixture_follow_its_shares(tiny_shards: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(inputs, "SECONDS", 0.0)
    monkeypatch.setattr(inputs, "stored_bytes", lambda folder: 100.0 if folder == str(tiny_shards) else 200.0)
    (tmp_path / "b").symlink_to(tiny_shards)
    config = configs.load(TINY, [f"--config.data.shards={tiny_shards}:1,{tmp_path / 'b'}:3"])
    found = inputs.input_facts(config, None)
    assert (found.examples, found.bytes_per_image) == (96, 175.0)


def test_input_facts_without_shards_are_assumed():
    found = inputs.input_facts(configs.load(TINY), None)
    assert (found.examples, found.examples_assumed, found.loader_per_core) == (1_281_167, True, None)
    assert found.bytes_per_image == 2 * found.canvas[0] * found.canvas[1]


def test_fine_tuning_needs_the_number_of_cases():
    config = configs.load("finetune_vit")
    with pytest.raises(UserError, match="give the number of cases to train on with --examples=N"):
        inputs.input_facts(config, None)
    assert inputs.input_facts(config, 800).examples == 800
