"""The checks of an exported folder: they pass for the trained model and for nothing else."""

import functools
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from curia_common.errors import DataError
from curia_jax import config as configs
from curia_jax.convert import checks, folder, layouts
from curia_jax.models import mae
from curia_jax.settings import Augment
from tests.convert.cases import CASES, HAS_TORCH, LAYOUTS_OF, TOLERANCE
from tests.convert.mistakes import MISTAKES, spoil
from tests.models import make_references as reference


@functools.cache
def model(name: str) -> tuple[mae.MAEConfig, dict[str, Any], dict[str, np.ndarray]]:
    """Config, parameters and the JAX model's results of a case."""
    config = mae.config(**CASES[name])
    params = reference.random_params(config, seed=1)
    return config, params, checks.run_jax(config, params, decoder=True)


def wanted(name: str, layout: str) -> dict[str, np.ndarray]:
    results = model(name)[2]
    return results if layout == "vit_mae" else {"features": results["features"]}


MADE = [
    (mistake, layout, name)
    for mistake, (_, among, _) in MISTAKES.items()
    for layout in among
    for name in ("three_channels", "tall_tanh")
    if layout in LAYOUTS_OF[name]
    and not (name == "tall_tanh" and mistake in ("images of another size", "twice the heads"))
]


@pytest.mark.parametrize(("mistake", "layout", "name"), MADE)
def test_numpy_check_detects_mistake(mistake: str, layout: str, name: str, converted, tmp_path) -> None:
    change, _, message = MISTAKES[mistake]
    spoilt = spoil(converted(name, layout)[0], tmp_path / "spoilt", change)
    with pytest.raises(checks.CheckFailed, match=message):
        checks.compare_numpy(spoilt, layout, checks.inputs(model(name)[0].encoder), wanted(name, layout))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("mistake", "layout", "message"),
    [
        ("query and key swapped", "vit", "differ: features"),
        ("channel first in the prediction", "vit_mae", "differ: prediction"),
        ("LayerNorm epsilon 1e-5", "dinov2", "differ: features"),
        ("the other GELU", "vit_mae", "differ"),
        ("final norm missing", "dinov2", "lists missing keys: layernorm.weight"),
        ("a tensor too many", "vit", "lists unexpected keys: head.weight"),
        ("an MLP of another width", "dinov2", "cannot load the folder|lists mismatched keys"),
    ],
)
def test_transformers_check_detects_mistake(mistake: str, layout: str, message: str, converted, tmp_path) -> None:
    spoilt = spoil(converted("three_channels", layout)[0], tmp_path / "spoilt", MISTAKES[mistake][0])
    with pytest.raises(checks.CheckFailed, match=f"transformers .* {message}"):
        inputs = checks.inputs(model("three_channels")[0].encoder)
        checks.compare_transformers(spoilt, layout, inputs, wanted("three_channels", layout))


def test_file_check_compares_every_bit(converted, tmp_path) -> None:
    config, params, _ = model("square")
    tensors, _ = layouts.tensors(layouts.LAYOUTS["vit"], config, params)

    def check(change: Any) -> None:
        checks.compare_file(spoil(converted("square", "vit")[0], tmp_path / change.__name__, change), tensors)

    def nothing(tensors: Any, config: Any) -> None:
        pass

    def last_bit(tensors: Any, config: Any) -> None:
        tensors["layernorm.bias"][2] = np.nextafter(tensors["layernorm.bias"][2], np.float32(9))

    def half_precision(tensors: Any, config: Any) -> None:
        tensors["layernorm.bias"] = tensors["layernorm.bias"].astype(np.float16)

    def renamed(tensors: Any, config: Any) -> None:
        tensors["layernorm.offset"] = tensors.pop("layernorm.bias")

    check(nothing)
    for change, message in (
        (last_bit, "the values of layernorm.bias are not those"),
        (half_precision, r"layernorm.bias is float16 \(16,\), wanted float32 \(16,\)"),
        (renamed, "layernorm.bias is in the file or in the model, but not in both"),
    ):
        with pytest.raises(checks.CheckFailed, match=message):
            check(change)


@pytest.mark.parametrize("change", ["cut", "missing"])
def test_damaged_weights_fail_the_numpy_check(change: str, tmp_path) -> None:
    config, params, _ = model("square")
    tensors, _ = layouts.tensors(layouts.LAYOUTS["vit"], config, params)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    path.unlink() if change == "missing" else path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(checks.CheckFailed, match="NumPy cannot read model.safetensors"):
        checks.compare_numpy(tmp_path, "vit", checks.inputs(config.encoder), wanted("square", "vit"))


def test_file_check_rejects_missing_format_entry(converted, tmp_path) -> None:
    config, params, _ = model("square")
    tensors, _ = layouts.tensors(layouts.LAYOUTS["vit"], config, params)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={})
    with pytest.raises(checks.CheckFailed, match="format=pt"):
        checks.compare_file(tmp_path, tensors)


@pytest.mark.parametrize("layout", ["vit_mae", "vit", "dinov2"])
def test_checks_detect_default_epsilon_of_transformers(layout: str, tmp_path) -> None:
    """With initial weights CLS has a variance of 4e-4, so that an epsilon of 1e-6 is visible."""
    config = mae.config(**CASES["square"])
    params = jax.device_get(mae.init(config, jax.random.key(0)))
    made = layouts.LAYOUTS[layout]
    tensors, _ = layouts.tensors(made, config, params)
    results = checks.run_jax(config, params, decoder=layout == "vit_mae")
    targets = []
    for name, settings in {"right": {}, "wrong": {"layer_norm_eps": 1e-12}}.items():
        targets.append(tmp_path / name)
        targets[-1].mkdir()
        content = made.config(config) | settings
        folder.write(targets[-1], tensors=tensors, metadata={}, config=content, preprocessor=None, card="")
    inputs = checks.inputs(config.encoder)
    assert all(check.difference < TOLERANCE for check in checks.compare_numpy(targets[0], layout, inputs, results))
    for check in [checks.compare_numpy, *([checks.compare_transformers] if HAS_TORCH else [])]:
        with pytest.raises(checks.CheckFailed, match=r"by \d.\de-0[345], allowed"):
            check(targets[1], layout, inputs, results)


def test_failed_check_names_largest_difference_and_its_place() -> None:
    results = {"features": np.zeros((3, 10, 16)), "prediction": np.zeros((3, 9, 75)), "loss": np.zeros(())}
    found = {what: values.copy() for what, values in results.items()}
    found["features"][2, 4, 11] = 3e-3
    found["prediction"][1, 5, 7] = -5e-2
    with pytest.raises(checks.CheckFailed) as error:
        checks.compare("NumPy", found, results)
    assert str(error.value) == (
        "NumPy and the trained model differ: prediction by 5.0e-02, allowed are 1e-05, "
        "at image 1, patch 5, value 7 (image 1 is half constant)"
    )


@pytest.mark.parametrize(
    ("value", "off", "held"),
    [(0.0, 0.9e-5, True), (0.0, 1.1e-5, False), (50.0, 4e-4, True), (50.0, 6e-4, False), (1.0, np.nan, False)],
)
def test_differences_are_relative_for_large_values_only(value, off, held) -> None:
    values = np.zeros((1, 1, 10_000))
    values[0, 0, 3] = value
    found = values.copy()
    found[0, 0, 3] += off
    if held:
        (check,) = checks.compare("NumPy", {"features": found}, {"features": values})
        assert check.allowed == TOLERANCE and check.difference == pytest.approx(off / max(1, value))
    else:
        with pytest.raises(checks.CheckFailed, match="features by .*, at image 0, token 0, channel 3"):
            checks.compare("NumPy", {"features": found}, {"features": values})


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "image_processing_curia_jax.py",
            "antialias=True",
            "antialias=False",
            "pixels by .*, at image ., .*is in (HU|other)",
        ),
        ("image_processing_curia_jax.py", "inverted_cdf", "linear", "pixels by .*is in other units"),
        ("preprocessor_config.json", "-200.0", "-210.0", "pixels by .*is in HU"),
        ("preprocessor_config.json", '"bicubic"', '"bilinear"', "pixels by"),
        ("preprocessor_config.json", '"hu_window"', '"window"', "cannot run the folder's image processor: .*hu_window"),
    ],
)
def test_changed_image_processor_is_detected(name, old, new, message, converted, tmp_path) -> None:
    source, _ = converted("square", "vit")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    encoder, settings = model("square")[0].encoder, Augment.of(configs.load("demo").augment)
    assert checks.compare_processor(tmp_path, settings, encoder).difference < 4e-5
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(checks.CheckFailed, match=message):
        checks.compare_processor(tmp_path, settings, encoder)


def test_inputs_include_patches_without_variance() -> None:
    images, noise = checks.inputs(model("square")[0].encoder)
    assert images.shape == (3, 24, 24, 1) and noise.shape == (3, 9)
    assert images[0].std() > 0.9
    assert (images[1, :12] == 0.5).all() and images[1, 12:].std() > 0.9
    assert not images[2].any()


def test_bfloat16_model_is_compared_in_float32() -> None:
    config, params, results = model("square")
    half = mae.config(**{**CASES["square"], "dtype": "bfloat16", "remat": "full", "unroll": 2})
    for what, values in checks.run_jax(half, params, decoder=True).items():
        np.testing.assert_array_equal(values, results[what], err_msg=what)


def test_weights_that_are_not_finite_are_data_error() -> None:
    config, params, _ = model("square")
    params = jax.tree.map(np.copy, params)
    params["encoder"]["norm"]["bias"][3] = np.nan
    with pytest.raises(DataError, match="features is not finite; convert an earlier one with --step"):
        checks.run_jax(config, params, decoder=False)


def test_missing_and_broken_packages_are_named(monkeypatch) -> None:
    with pytest.raises(checks.NotUsable, match="no_such_package is not installed"):
        checks.import_package("no_such_package")
    monkeypatch.setattr(checks.importlib, "import_module", lambda name: [][0])
    with pytest.raises(checks.NotUsable, match="json cannot be imported: list index out of range"):
        checks.import_package("json")


def test_pytorch_is_imported_only_for_its_check() -> None:
    code = (
        "import sys, curia_jax.convert.__main__, curia_jax.convert.card, curia_jax.convert.checks\n"
        "print([name for name in ('torch', 'transformers', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
