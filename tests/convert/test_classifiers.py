"""Fine-tuned runs as the classifiers of transformers and timm: their logits, labels, and what each class cannot hold."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from curia_common.errors import UserError
from curia_jax.convert import __main__ as convert
from curia_jax.convert import checks, layouts, numpy_forward, reading
from curia_jax.models import head, mae, vit
from curia_jax.models.head import HeadConfig
from tests.convert.cases import CASES, HAS_TORCH, TOLERANCE
from tests.convert.fine_tuned import CLASSES, params_of, run
from tests.models import make_references as reference

if HAS_TORCH:
    from tests.convert import timm_like

HELD = [
    (layout, pooling)
    for layout, poolings in (("vit", ("cls",)), ("dinov2", head.POOLINGS), ("timm", ("cls", "mean")))
    for pooling in poolings
]


@pytest.fixture
def export(tmp_path):
    """(head, layout) -> the folder that the command writes of a run with this head."""

    def make(config: HeadConfig, layout: str) -> Path:
        output = tmp_path / layout
        assert convert.main([f"--checkpoint={run(config)}", f"--output={output}", f"--layout={layout}"]) == 0
        return output

    return make


@functools.cache
def images() -> np.ndarray:
    return np.asarray(reference.inputs(mae.config(**CASES["square"]), seed=2)[0])


@functools.cache
def tokens() -> np.ndarray:
    encoder = vit.bind(mae.config(**CASES["square"]).encoder, params_of(CLASSES)["encoder"])
    return np.asarray(jax.jit(encoder)(jnp.asarray(images())), np.float64)


def wanted(config: HeadConfig) -> np.ndarray:
    """Logits by the definition, from the tokens of the JAX encoder."""
    params = params_of(config)["head"]
    cls, mean = tokens()[:, 0], tokens()[:, 1:].mean(axis=1)
    pooled = {"cls": cls, "mean": mean, "cls_mean": np.concatenate([cls, mean], axis=1)}[config.pooling]
    return config.mean + config.scale * (pooled @ params["kernel"] + params["bias"])


def channels_first(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


# ---- logits


@pytest.mark.parametrize(("kind", "pooling"), HELD)
def test_numpy_forward_of_classifier_gives_our_logits(kind: str, pooling: str, export) -> None:
    config, layout = dataclasses.replace(CLASSES, pooling=pooling), f"{kind}_classifier"
    folder = export(config, layout)
    settings = numpy_forward.read_settings(layout, json.loads((folder / "config.json").read_text()))
    tensors = numpy_forward.Tensors(safetensors.numpy.load_file(folder / "model.safetensors"))
    features = numpy_forward.features(layout, settings, tensors, channels_first(images()))
    found = numpy_forward.logits(layout, settings, tensors, features)
    np.testing.assert_allclose(found, wanted(config), rtol=0, atol=TOLERANCE)
    assert {name for name in tensors.unread if not name.endswith("mask_token")} == set()


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "pooling"), [case for case in HELD if case[0] != "timm"])
def test_transformers_classifier_gives_our_logits(kind: str, pooling: str, export) -> None:
    import torch
    from transformers import AutoModelForImageClassification

    config = dataclasses.replace(CLASSES, pooling=pooling)
    folder = export(config, f"{kind}_classifier")
    loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found = loaded.eval()(torch.tensor(channels_first(images()))).logits
    np.testing.assert_allclose(found, wanted(config), rtol=0, atol=TOLERANCE)
    assert loaded.config.id2label == {0: "no tear", 1: "partial", 2: "complete"}
    assert loaded.config.label2id == {"no tear": 0, "partial": 1, "complete": 2}
    assert loaded.config.problem_type == "single_label_classification"


@pytest.mark.torch
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_module_with_names_of_timm_gives_our_logits(pooling: str, export) -> None:
    import torch
    from safetensors.torch import load_file

    config = dataclasses.replace(CLASSES, pooling=pooling)
    folder = export(config, "timm_classifier")
    content = json.loads((folder / "config.json").read_text())
    assert content["label_names"] == list(CLASSES.names) and content["num_classes"] == 3
    loaded = timm_like.VisionTransformer(num_classes=content["num_classes"], **content["model_args"])
    loaded.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        found = loaded(torch.tensor(channels_first(images())))
    np.testing.assert_allclose(found, wanted(config), rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed; make test-backbones has it"
)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_timm_classifier_gives_our_logits(pooling: str, export) -> None:
    import timm  # pyright: ignore[reportMissingImports] - optional
    import torch

    config = dataclasses.replace(CLASSES, pooling=pooling)
    loaded = timm.create_model(f"local-dir:{export(config, 'timm_classifier')}", pretrained=True).eval()
    with torch.no_grad():
        found = loaded(torch.tensor(channels_first(images())))
    np.testing.assert_allclose(found, wanted(config), rtol=0, atol=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["vit_classifier", "dinov2_classifier"])
@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (HeadConfig("linear", "cls", "labels", ("bleed", "fracture")), "multi_label_classification"),
        (HeadConfig("linear", "cls", "value", ("age",), mean=54.0, scale=16.5), "regression"),
        (HeadConfig("linear", "cls", "time", ("death",)), "regression"),
    ],
    ids=["labels", "value", "time"],
)
def test_outputs_of_other_targets_are_in_their_units(layout: str, config: HeadConfig, problem: str, export) -> None:
    import torch
    from transformers import AutoModelForImageClassification

    loaded = AutoModelForImageClassification.from_pretrained(export(config, layout)).eval()
    assert loaded.config.problem_type == problem
    with torch.no_grad():
        found = loaded(torch.tensor(channels_first(images()))).logits
    # A value of about 54 rounds to 4e-6 in float32.
    np.testing.assert_allclose(found, wanted(config), rtol=TOLERANCE, atol=TOLERANCE)


def test_export_of_classifier_is_read_back_with_its_head(export) -> None:
    config = HeadConfig("linear", "mean", "value", ("age",), mean=54.0, scale=16.5)
    read = reading.read(export(config, "dinov2_classifier"))
    assert read.head == HeadConfig("linear", "cls_mean", "value", ("age",))
    assert read.head is not None and read.head_params is not None
    jax.tree.map(np.testing.assert_array_equal, dict(read.params), params_of(config)["encoder"])
    bound = head.bind(read.head, read.config.width, read.head_params)
    found = bound(jnp.asarray(tokens()[:, None], jnp.float32), jnp.ones((3, 1), bool)).outputs
    np.testing.assert_allclose(found, wanted(config), rtol=TOLERANCE)


# ---- the command


def test_several_layouts_get_a_folder_each(tmp_path) -> None:
    words = [
        f"--output={tmp_path / 'ich'}",
        "--layout=vit_classifier,dinov2_classifier,timm",
        f"--json={tmp_path / 'made'}",
    ]
    assert convert.main([f"--checkpoint={run(CLASSES)}", *words]) == 0
    made = json.loads((tmp_path / "made").read_text())
    assert [one["layout"] for one in made] == ["vit_classifier", "dinov2_classifier", "timm"]
    for one in made:
        assert {path.name for path in (tmp_path / "ich" / one["layout"]).iterdir()} == {
            file["name"] for file in one["files"]
        }
        checked = {check["what"] for check in one["checks"] if check["by"] == "NumPy"}
        assert checked == {"features"} | ({"logits"} if one["layout"] != "timm" else set())


def test_nothing_is_written_if_one_of_several_layouts_cannot(tmp_path, capsys) -> None:
    workdir = run(dataclasses.replace(CLASSES, pooling="mean"))
    words = [f"--output={tmp_path / 'ich'}", "--layout=dinov2_classifier,vit_classifier"]
    assert convert.main([f"--checkpoint={workdir}", *words]) == 2
    assert "ViTForImageClassification pools cls" in capsys.readouterr().err
    assert not (tmp_path / "ich").exists()


def test_card_and_config_say_what_the_head_is(export) -> None:
    folder = export(CLASSES, "vit_classifier")
    card = (folder / "README.md").read_text()
    for text in (
        "Classifier (one class each), fine-tuned on ich with curia_jax", "ViTForImageClassification.from_pretrained",
        "`logits` is batch x 3; their softmax are probabilities of 0 no tear, 1 partial, 2 complete.",
    ):  # fmt: skip
        assert text in card
    assert "no training loss acted on it" not in card
    own = json.loads((folder / "config.json").read_text())["curia_jax"]
    assert own["task"] == "ich" and own["slices"] == 1
    assert own["head"] == dataclasses.asdict(CLASSES) | {"names": list(CLASSES.names)}


def test_encoder_of_fine_tuned_run_says_that_its_head_stays_behind(export, caplog) -> None:
    folder = export(CLASSES, "vit")
    assert "the head stays behind: --layout=vit holds the encoder alone" in caplog.text
    assert "Encoder of a masked autoencoder, fine-tuned on ich with curia_jax" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTModel"]


def test_changed_head_is_found_by_the_checks(export) -> None:
    folder = export(CLASSES, "vit_classifier")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"][::-1].copy()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = mae.config(**CASES["square"])
    computed = checks.run_jax(config, params_of(CLASSES), decoder=False, head_config=CLASSES)
    with pytest.raises(checks.CheckFailed, match=r"differ: logits by .*, at image \d, output \d"):
        checks.compare_numpy(folder, "vit_classifier", checks.inputs(config.encoder), computed)


# ---- what a class cannot hold


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ("vit_classifier", dataclasses.replace(CLASSES, pooling="mean"),
         "ViTForImageClassification pools cls, but this run's head mean; use --layout=dinov2_classifier, timm_classifier, or fine-tune"),
        ("timm_classifier", dataclasses.replace(CLASSES, pooling="cls_mean"),
         "pools cls or mean, but this run's head cls_mean; use --layout=dinov2_classifier, or"),
        ("vit_classifier", dataclasses.replace(CLASSES, kind="attentive"),
         "has a linear head, but this run's is attentive; --layout=vit holds its encoder, and curia_jax.predict runs it as it is"),
        ("dinov2_classifier", None, "has a head, which a pretrained run has not; use --layout=vit, dinov2 or timm"),
    ],
    ids=["pooling", "pooling of timm", "kind", "pretrained"],
)  # fmt: skip
def test_layout_refuses_head_that_its_class_lacks(layout: str, config: HeadConfig | None, message: str) -> None:
    with pytest.raises(UserError, match=f"--layout={layout} cannot hold this model: .*{message}"):
        layouts.LAYOUTS[layout].check(mae.config(**CASES["square"]), config)


def test_layout_with_decoder_refuses_fine_tuned_run() -> None:
    with pytest.raises(UserError, match="has a decoder, which a fine-tuned run has not; use --layout=vit"):
        layouts.LAYOUTS["vit_mae"].check(mae.config(**CASES["square"]), CLASSES, decoder=False)


def test_classifier_refuses_head_on_a_region() -> None:
    config = dataclasses.replace(CLASSES, pooling="mean")
    with pytest.raises(UserError, match="pools all patches, but this run's head those inside a mask"):
        layouts.LAYOUTS["dinov2_classifier"].check(mae.config(**CASES["square"]), config, region=True)
