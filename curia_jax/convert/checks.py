"""Checks that a written folder computes what the trained model does.

Each check reads the files back, runs them with code that is not the JAX model, and compares. Differences are in units of
max(1, |value|, root mean square of all values): absolute for features of ordinary size and relative for large ones, as
float32 rounds.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import runpy
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from curia_common.errors import DataError
from curia_jax import augment
from curia_jax.convert import adapter, numpy_forward
from curia_jax.convert.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, PROCESSOR_CODE, WEIGHTS
from curia_jax.convert.layouts import LAYOUTS, Layout
from curia_jax.models import head, mae, vit
from curia_jax.models.head import HeadConfig
from curia_jax.models.params import Params
from curia_jax.settings import Augment

# float32 rounds to 6e-8 of a value, and a ViT's residual stream collects a few dozen such errors at random: ViT-B and -L
# differ by up to 5e-6 from float64. Twice that is allowed; a wrong epsilon or GELU makes 3e-5 to 1e-2, a wrong tensor
# 1e-2 and more.
TOLERANCE = 1e-5
# Of pixels, after division by their standard deviation, 1 / image_std times a window: JAX computes HU / width - low / width in
# float32. Another filter, or a shift by half a pixel, makes 1e-2 and more.
PIXEL_TOLERANCE = 1e-4

IMAGES = ("random", "half constant", "zeros")
SLICES = ("in HU", "in other units")  # for the image processor
_AXES = {
    "features": ("image", "token", "channel"), "prediction": ("image", "patch", "value"), "mask": ("image", "patch"),
    "logits": ("image", "output"), "loss": (), "pixels": ("image", "channel", "row", "column"),
}  # fmt: skip

Results = Mapping[str, Float[np.ndarray, "..."]]


class CheckFailed(DataError):
    """The written folder does not compute what the trained model does; the message says how and where they differ."""


class NotUsable(Exception):
    """A package is missing or broken; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison that passed.

    Attributes:
      by: what read the folder: "file", "NumPy", "transformers 5.23.0", …
      what: tensors, keys, pixels, features, logits, prediction, mask or loss.
      difference: the largest; 0 for equal tensors and for keys that all matched.
      allowed: largest difference that passes.
    """

    by: str
    what: str
    difference: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of all checks of a folder.

    Attributes:
      held: the comparisons that passed; one that fails raises instead.
      not_run: package -> why it was not run.
    """

    held: tuple[Check, ...]
    not_run: Mapping[str, str]


class Inputs(NamedTuple):
    """Images, one for each of IMAGES, and masking noise."""

    images: Float[np.ndarray, "batch rows columns channels"]
    noise: Float[np.ndarray, "batch patches"]


def inputs(config: vit.ViTConfig) -> Inputs:
    """What is computed. Patches without variance show a wrong epsilon best."""
    random = np.random.default_rng(0)
    images = random.standard_normal((len(IMAGES), *config.image_size, config.channels), np.float32)
    images[1, : config.image_size[0] // 2] = 0.5  # sums of it are exact in float32
    images[2] = 0.0
    return Inputs(images, random.random((len(IMAGES), config.patches), np.float32))


def run_jax(config: mae.MAEConfig, params: Params, *, decoder: bool, head_config: HeadConfig | None = None) -> Results:
    """What the JAX model computes for `inputs`, in float32: features; with `decoder` also prediction, mask and loss.

    Args:
      params: branches of the model; `head` where there is one.
      head_config: of a classifier, for logits; those of a value are in its units.

    Raises:
      DataError: a result is not finite.
    """
    config = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, dtype="float32", remat="none", unroll=1)
    )
    images, noise = (jnp.asarray(array) for array in inputs(config.encoder))

    @jax.jit
    def run(params: Params) -> dict[str, jax.Array]:
        tokens = vit.bind(config.encoder, params["encoder"])(images)
        results = {"features": tokens}
        if head_config is not None:
            bound = head.bind(head_config, config.encoder.width, params["head"])
            outputs = bound(tokens[:, None], jnp.ones((len(tokens), 1), bool)).outputs
            results["logits"] = head_config.mean + head_config.scale * outputs
        if decoder:
            output = mae.bind(config, params)(images, noise)
            results |= {"prediction": output.prediction, "mask": output.mask, "loss": output.loss}
        return results

    used = ("encoder", *(["decoder"] if decoder else []), *(["head"] if head_config else []))
    results = jax.device_get(run({part: params[part] for part in used}))
    for what, values in results.items():
        if not np.isfinite(values).all():
            raise DataError(f"the checkpoint's {what} is not finite; convert an earlier one with --step")
    return results


def run(
    folder: Path,
    layout: Layout,
    config: mae.MAEConfig,
    settings: Augment,
    wanted: Results,
    tensors: Mapping[str, np.ndarray],
) -> Report:
    """All checks that this machine can run.

    Args:
      settings: how pixels are prepared.
      wanted: from `run_jax`.
      tensors: what was to be written.

    Raises:
      CheckFailed: a comparison failed.
    """
    given = inputs(config.encoder)
    held = [compare_file(folder, tensors), *compare_numpy(folder, layout.name, given, wanted)]
    package, check = ("transformers", compare_transformers) if layout.for_transformers else ("timm", compare_timm)
    try:
        import_package("torch")
        import_package(package)
        held += check(folder, layout.name, given, wanted)
        if layout.for_transformers:
            held.append(compare_processor(folder, settings, config.encoder))
    except NotUsable as error:
        return Report(tuple(held), {package: str(error)})
    return Report(tuple(held), {})


def run_adapter(
    folder: Path, layout: Layout, base: Mapping[str, np.ndarray], renamed: Mapping[str, str], wanted: Results,
    tensors: Mapping[str, np.ndarray], inputs: Inputs, *, version: int,
) -> Report:  # fmt: skip
    """All checks of an adapter that this machine can run: what it makes of its base model is the trained model.

    Args:
      base: tensors of the base model in this layout.
      renamed: module as the adapter names it -> as the base does.
      tensors: what was to be written.
      version: of transformers that the adapter is for.

    Raises:
      CheckFailed: a comparison failed.
    """
    held = [compare_file(folder, tensors, ADAPTER_WEIGHTS)]
    content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    written = safetensors.numpy.load_file(folder / ADAPTER_WEIGHTS)
    try:
        whole = adapter.merged(base, written, content, renamed)
    except KeyError as error:
        raise CheckFailed(f"{ADAPTER_WEIGHTS} names {error.args[0]!r}, which the base model has not") from error
    held += _compare_tensors(folder, layout.name, whole, inputs, wanted)
    try:
        for package in ("torch", "transformers", "peft"):
            import_package(package)
        held += compare_peft(folder, layout, base, inputs, wanted, version=version)
    except NotUsable as error:
        return Report(tuple(held), {"peft": str(error)})
    return Report(tuple(held), {})


# ---- comparing


def differences(found: Results, wanted: Results) -> dict[str, tuple[float, tuple[int, ...]]]:
    """The largest difference of each array in `wanted` to the one in `found`, and its index.

    In units of max(1, |wanted|, root mean square of wanted), element by element; what is not finite is infinitely far.
    """
    worst = {}
    for what, values in wanted.items():
        result, values = np.asarray(found[what], np.float64), np.asarray(values, np.float64)
        if result.shape != values.shape:
            raise CheckFailed(f"{what} has the shape {result.shape}, but {values.shape} in the trained model")
        size = np.maximum(np.abs(values), max(1.0, math.sqrt(np.mean(np.square(values)))))
        difference = np.nan_to_num(np.abs(result - values) / size, nan=np.inf, posinf=np.inf)
        place = np.unravel_index(int(difference.argmax()), difference.shape)
        worst[what] = float(difference.max()), tuple(int(number) for number in place)
    return worst


def compare(by: str, found: Results, wanted: Results) -> list[Check]:
    """Every array of `wanted` against the one of `found`.

    Raises:
      CheckFailed: at least one differs by more than is allowed; the message has the worst.
    """
    held, failed = [], []
    for what, (worst, place) in differences(found, wanted).items():
        allowed = {"mask": 0.0, "pixels": PIXEL_TOLERANCE}.get(what, TOLERANCE)
        if worst <= allowed:
            held.append(Check(by, what, worst, allowed))
            continue
        where = ", ".join(f"{axis} {number}" for axis, number in zip(_AXES[what], place, strict=True))
        if place:
            images = SLICES if what == "pixels" else IMAGES
            where = f", at {where} (image {place[0]} is {images[place[0]]})"
        failed.append((worst, f"{what} by {worst:.1e}, allowed are {allowed:.0e}{where}"))
    if failed:
        raise CheckFailed(f"{by} and the trained model differ: {max(failed)[1]}")
    return held


def compare_file(folder: Path, tensors: Mapping[str, np.ndarray], name: str = WEIGHTS) -> Check:
    """Every tensor of the file `name`, bit by bit.

    Raises:
      CheckFailed: a name, type, shape or value differs.
    """
    written, weights = safetensors.numpy.load_file(folder / name), name
    with safetensors.safe_open(folder / weights, framework="numpy") as file:
        if file.metadata().get("format") != "pt":
            raise CheckFailed(f"{weights} lacks the metadata format=pt")
    if names := sorted(set(written) ^ set(tensors)):
        raise CheckFailed(f"{weights}: {names[0]} is in the file or in the model, but not in both")
    for name, values in tensors.items():
        found = written[name]
        if (found.dtype, found.shape) != (np.dtype(np.float32), values.shape):
            raise CheckFailed(f"{weights}: {name} is {found.dtype} {found.shape}, wanted float32 {values.shape}")
        if not np.array_equal(found, values):
            raise CheckFailed(f"{weights}: the values of {name} are not those that were to be written")
    return Check("file", "tensors", 0.0, 0.0)


# ---- NumPy


def compare_numpy(folder: Path, layout: str, inputs: Inputs, wanted: Results) -> list[Check]:
    """The forward pass of numpy_forward.

    Raises:
      CheckFailed: it does not run, leaves tensors unused or computes something else.
    """
    try:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    except Exception as error:  # the file can be damaged in any way
        raise CheckFailed(f"NumPy cannot read {WEIGHTS}: {_first_line(error)}") from error
    return _compare_tensors(folder, layout, tensors, inputs, wanted)


def _compare_tensors(
    folder: Path, layout: str, tensors: Mapping[str, np.ndarray], inputs: Inputs, wanted: Results
) -> list[Check]:
    """As `compare_numpy`, with these tensors in place of those of the folder."""
    pixels = inputs.images.transpose(0, 3, 1, 2)
    read = numpy_forward.Tensors(tensors)
    try:
        settings = numpy_forward.read_settings(layout, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        found = {"features": numpy_forward.features(layout, settings, read, pixels)}
        if "logits" in wanted:
            found["logits"] = numpy_forward.logits(layout, settings, read, found["features"])
        if "prediction" in wanted:
            found |= numpy_forward.reconstruction(settings, read, pixels, inputs.noise)
    except KeyError as error:
        raise CheckFailed(f"NumPy finds no {error.args[0]!r} in {WEIGHTS} or {CONFIG}") from error
    except Exception as error:  # whatever in them is not as it was written
        raise CheckFailed(f"NumPy cannot run the model of {WEIGHTS} and {CONFIG}: {_first_line(error)}") from error
    unread = {name for name in read.unread if not name.endswith("embeddings.mask_token")}
    if unread:
        raise CheckFailed(f"{WEIGHTS} holds {min(unread)}, which this layout does not use")
    return compare("NumPy", found, wanted)


# ---- PyTorch


def import_package(name: str) -> None:
    """Raises NotUsable where an optional package is missing or broken."""
    if importlib.util.find_spec(name) is None:
        raise NotUsable(f"{name} is not installed")
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything
        raise NotUsable(f"{name} cannot be imported: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def compare_transformers(folder: Path, layout: str, inputs: Inputs, wanted: Results) -> list[Check]:
    """Loads the folder as its users do and runs it on the CPU in float32.

    Raises:
      CheckFailed: loading fails, a key is missing, unexpected or of another shape, or something else is computed.
      NotUsable: this installation lacks the class.
    """
    import torch
    import transformers

    by = f"transformers {transformers.__version__}"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        target = getattr(transformers, LAYOUTS[layout].target)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotUsable(f"{by} cannot import its models: {_first_line(error)}") from error
    extra = {"add_pooling_layer": False} if layout == "vit" else {}
    try:
        model, info = target.from_pretrained(folder, output_loading_info=True, local_files_only=True, **extra)
    except Exception as error:  # a wrong file can break a loader in any way
        raise CheckFailed(f"{by} cannot load the folder: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckFailed(f"{by} lists {kind.replace('_', ' ')}: {min(map(str, info[kind]))}")
    model = model.to("cpu", torch.float32).eval()
    pixels = torch.tensor(inputs.images).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        if layout == "vit_mae":
            output = model(pixels, noise=torch.tensor(inputs.noise))
            found = {"prediction": output.logits, "mask": output.mask, "loss": output.loss}
            # For features: nothing masked, patches in the order of the image.
            model.config.mask_ratio = 0.0
            in_order = torch.arange(inputs.noise.shape[1], dtype=torch.float32).expand(inputs.noise.shape)
            found["features"] = model.vit(pixels, noise=in_order).last_hidden_state
        elif layout.endswith("_classifier"):
            output = model(pixels)
            found = {"features": model.base_model(pixels).last_hidden_state, "logits": output.logits}
        else:
            found = {"features": model(pixels).last_hidden_state}
    results = {what: values.numpy() for what, values in found.items()}
    return [Check(by, "keys", 0.0, 0.0), *compare(by, results, wanted)]


def compare_peft(
    folder: Path, layout: Layout, base: Mapping[str, np.ndarray], inputs: Inputs, wanted: Results, *, version: int
) -> list[Check]:
    """Loads the base model and the adapter as their users do and runs them on the CPU in float32.

    Raises:
      CheckFailed: loading fails, a layer is without its adapter, or something else is computed.
      NotUsable: this installation has another version of transformers than the adapter is for.
    """
    import peft  # pyright: ignore[reportMissingImports] - optional, in the extra `backbones`
    import torch
    import transformers

    if int(transformers.__version__.split(".")[0]) != version:
        raise NotUsable(f"transformers is {transformers.__version__}, and the adapter for {version}")
    by = f"peft {peft.__version__}"
    with tempfile.TemporaryDirectory() as place:
        safetensors.numpy.save_file(dict(base), Path(place, WEIGHTS), metadata={"format": "pt"})
        Path(place, CONFIG).write_bytes((folder / CONFIG).read_bytes())
        try:
            model = getattr(transformers, layout.target).from_pretrained(place, local_files_only=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys.*")
                model = peft.PeftModel.from_pretrained(model, folder)
        except Exception as error:  # a wrong file can break a loader in any way
            raise CheckFailed(f"{by} cannot load the folder: {_first_line(error)}") from error
    model = model.to("cpu", torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(inputs.images).permute(0, 3, 1, 2).contiguous()).logits
    return compare(by, {"logits": logits.numpy()}, {"logits": wanted["logits"]})


def compare_processor(folder: Path, settings: Augment, encoder: vit.ViTConfig) -> Check:
    """The folder's image processor against `augment.evaluation_view`, on slices of SLICES.

    Raises:
      CheckFailed: it does not run, or prepares other pixels.
      NotUsable: this installation lacks what the processor is made of.
    """
    import transformers

    by = f"transformers {transformers.__version__}"
    # Larger in one direction and smaller in the other, so that both kinds of resampling are compared.
    rows, columns = 2 * encoder.image_size[0] + 3, max(2, encoder.image_size[1] * 2 // 3)
    stored = np.random.default_rng(0).integers(0, 2500, (len(SLICES), rows, columns)).astype(np.uint16)
    low, high = np.percentile(stored[1], (0.5, 99.5), method="inverted_cdf")
    batch: augment.Batch = {
        "pixels": jnp.asarray(stored), "extent": jnp.full((len(SLICES), 2), jnp.asarray([rows, columns], jnp.int32)),
        "slope": jnp.ones(len(SLICES)), "intercept": jnp.asarray([-1024.0, 0.0]),
        "low": jnp.full(len(SLICES), low, jnp.float32), "high": jnp.full(len(SLICES), high, jnp.float32),
        "hu": jnp.asarray([True, False]),
    }  # fmt: skip
    view = augment.evaluation_view(batch, settings, encoder.image_size)
    wanted = np.broadcast_to(
        np.asarray(view).transpose(0, 3, 1, 2), (len(SLICES), encoder.channels, *encoder.image_size)
    )
    try:
        # Not by AutoImageProcessor, which would leave a copy of the code in the user's cache.
        code = runpy.run_path(str(folder / PROCESSOR_CODE))
    except ImportError as error:
        raise NotUsable(f"{by} cannot import the image processor: {_first_line(error)}") from error
    pixels = []
    try:
        for hu, values in ((True, stored[0].astype(np.int16) - 1024), (False, stored[1])):
            processor = code["CuriaJaxImageProcessor"].from_pretrained(folder, local_files_only=True)
            processor.hu = hu
            pixels.append(np.asarray(processor(values)["pixel_values"][0]))
    except Exception as error:  # a wrong file can break it in any way
        raise CheckFailed(f"{by} cannot run the folder's image processor: {_first_line(error)}") from error
    return compare(by, {"pixels": np.stack(pixels)}, {"pixels": wanted})[0]


def compare_timm(folder: Path, layout: str, inputs: Inputs, wanted: Results) -> list[Check]:
    """Builds the model from config.json, loads it strictly and runs it on the CPU in float32.

    Raises:
      CheckFailed: loading fails, also for a missing or an extra key, or something else is computed.
    """
    import timm  # pyright: ignore[reportMissingImports] - optional, and not in requirements: it needs torchvision
    import torch
    from safetensors.torch import load_file

    by = f"timm {timm.__version__}"
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        model = timm.create_model(
            config["architecture"], pretrained=False, num_classes=config["num_classes"], **config["model_args"]
        )
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except Exception as error:  # a wrong file can break a loader in any way
        raise CheckFailed(f"{by} cannot load the folder: {_first_line(error)}") from error
    with torch.no_grad():
        features = model.eval().forward_features(torch.tensor(inputs.images).permute(0, 3, 1, 2).contiguous())
        found = {"features": features.numpy()}
        if "logits" in wanted:
            found["logits"] = model.forward_head(features).numpy()
    return [Check(by, "keys", 0.0, 0.0), *compare(by, found, wanted)]
