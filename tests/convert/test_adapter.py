"""Adapters of fine-tuned runs in the form of peft: merged by definition, and by peft where it is installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from curia_jax import trained_model
from curia_jax.convert import __main__ as convert
from curia_jax.convert import adapter, layouts
from curia_jax.models import lora
from tests.convert.fine_tuned import ALPHA, CLASSES, RANK, params_of, run
from tests.convert.test_classifiers import channels_first, images

ALL = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture
def export(tmp_path):
    """(targets, layout, version) -> the folder of the adapter."""

    def make(targets: tuple[str, ...], layout: str, version: int) -> Path:
        output = tmp_path / layout
        words = [f"--output={output}", f"--layout={layout}", f"--adapter={version}", f"--json={tmp_path / 'made'}"]
        assert convert.main([f"--checkpoint={run(CLASSES, targets)}", *words]) == 0
        return output

    return make


@pytest.mark.parametrize("version", adapter.VERSIONS)
@pytest.mark.parametrize("layout", adapter.LAYOUTS)
def test_adapter_has_pairs_for_q_k_and_v_that_sum_to_the_fused_one(layout: str, version: int, export) -> None:
    folder = export(("qkv",), layout, version)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    block = {
        ("vit_classifier", 4): "vit.encoder.layer.1.attention.attention.", ("vit_classifier", 5): "vit.layers.1.attention.",
        ("dinov2_classifier", 4): "dinov2.encoder.layer.1.attention.attention.",
        ("dinov2_classifier", 5): "dinov2.encoder.layer.1.attention.",
    }[layout, version]  # fmt: skip
    names = ("query", "key", "value") if version == 4 else ("q_proj", "k_proj", "v_proj")
    own = params_of(CLASSES, ("qkv",))["lora"]["blocks"]["attn"]["qkv"]
    fused = own["a"][1] @ own["b"][1]
    for name, columns in zip(names, np.split(fused, 3, axis=1), strict=True):
        a, b = (tensors[f"base_model.model.{block}{name}.lora_{half}.weight"] for half in "AB")
        assert a.shape == (RANK, 16) and b.shape == (16, RANK)
        np.testing.assert_allclose((b @ a).T, columns, rtol=0, atol=1e-6)
    assert len(tensors) == 2 * 3 * 2 + 2  # pairs of two blocks, and the head
    content = json.loads((folder / "adapter_config.json").read_text())
    assert (content["peft_type"], content["r"], content["lora_alpha"]) == ("LORA", RANK, 6)
    assert content["modules_to_save"] == ["classifier"]


@pytest.mark.torch
@pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed; make test-backbones has it"
)
@pytest.mark.parametrize("targets", [ALL, ("qkv",), ("proj",), ("fc2",)], ids="+".join)
@pytest.mark.parametrize("layout", adapter.LAYOUTS)
def test_peft_gives_the_logits_of_the_merged_export(layout: str, targets: tuple[str, ...], export, tmp_path) -> None:
    import torch
    import transformers
    from peft import PeftModel  # pyright: ignore[reportMissingImports] - optional

    version = int(transformers.__version__.split(".")[0])
    folder = export(targets, layout, version)
    # The run that fine-tuning started from, with the head of the fine-tuned one.
    for name, workdir in (("merged", run(CLASSES, targets)), ("base", run(CLASSES))):
        words = [f"--checkpoint={workdir}", f"--output={tmp_path / name}", f"--layout={layout}"]
        assert convert.main(words) == 0
    checked = json.loads((tmp_path / "made").read_text())["checks"]
    assert any(check["by"].startswith("peft") and check["what"] == "logits" for check in checked)

    kind = transformers.AutoModelForImageClassification
    base = tmp_path / "base"
    pixels = torch.tensor(channels_first(images()))
    with torch.no_grad():
        found = PeftModel.from_pretrained(kind.from_pretrained(base), folder).eval()(pixels).logits
        merged = kind.from_pretrained(tmp_path / "merged").eval()(pixels).logits
        plain = kind.from_pretrained(base).eval()(pixels).logits
    np.testing.assert_allclose(found, merged, rtol=0, atol=1e-5)
    assert float((found - plain).abs().max()) > 0.1


def test_merging_both_files_into_the_base_is_the_trained_encoder(export) -> None:
    layout, trained = layouts.LAYOUTS["vit_classifier"], trained_model.load(run(CLASSES, ALL))
    folder = export(ALL, layout.name, 5)
    assert trained.head_params is not None
    wanted, _ = layouts.tensors(layout, trained.config, {**trained.params, "head": trained.head_params})
    base, _ = layouts.tensors(layout, trained.config, params_of(CLASSES))
    found = adapter.merged(
        base, safetensors.numpy.load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()), adapter.renamed(layout, lora.LoRAConfig(RANK, ALPHA, ALL), 2, 5),
    )  # fmt: skip
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6, err_msg=name)
    own = json.loads((folder / "config.json").read_text())["curia_jax"]
    assert own["base_encoder_sha256"] == trained_model.digest(params_of(CLASSES)["encoder"])


def test_adapter_that_is_scaled_twice_is_found_by_the_checks(monkeypatch, tmp_path, capsys) -> None:
    content = adapter.config_json
    monkeypatch.setattr(adapter, "config_json", lambda *words: content(*words) | {"lora_alpha": 12})
    words = [f"--output={tmp_path / 'out'}", "--layout=vit_classifier", "--adapter"]
    assert convert.main([f"--checkpoint={run(CLASSES, ALL)}", *words]) == 65
    assert "NumPy and the trained model differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout=vit_classifier"], "has no adapter: it was not fine-tuned with --config.finetune.train=lora"),
        (
            ["--layout=timm_classifier"],
            "--adapter is for --layout=vit_classifier or dinov2_classifier, not timm_classifier",
        ),
    ],
)
def test_adapter_is_refused_where_there_is_none(words, message, tmp_path, capsys) -> None:
    assert convert.main([f"--checkpoint={run(CLASSES)}", f"--output={tmp_path / 'out'}", "--adapter", *words]) == 2
    assert message in capsys.readouterr().err
