"""Is the written folder the trained model? Read back, run by programs that are not ours, and compared.

Every check starts from the files alone. Differences are in units of max(1, |value|, root mean square of all values), so
that they are absolute for features of ordinary size and relative for large ones, as float32 rounds.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from curia_common.errors import UserError
from curia_jax.convert import numpy_forward
from curia_jax.convert.folder import CONFIG, WEIGHTS
from curia_jax.convert.layouts import Layout
from curia_jax.models import mae, vit

# float32 rounds to 6e-8 of a value, and a ViT's residual stream collects a few dozen such roundings, more or less at
# random: ViT-B and -L differ by up to 5e-6 from float64. Twice that is allowed; a wrong epsilon or GELU makes 3e-5 to
# 1e-2, a wrong tensor 1e-2 and more.
TOLERANCE = 1e-5

IMAGES = ("random", "half constant", "zeros")
_AXES = {
    "features": ("image", "token", "channel"), "prediction": ("image", "patch", "value"), "mask": ("image", "patch"),
    "loss": (),
}  # fmt: skip

Results = Mapping[str, Float[np.ndarray, "..."]]


class CheckFailed(Exception):
    """The written folder is not the trained model; the message says how and where they differ."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison that held.

    Attributes:
      by: what read the folder: "file", "NumPy", "transformers 5.23.0", …
      what: tensors, keys, features, prediction, mask or loss.
      difference: the largest; 0 for equal tensors and for keys that all matched.
      allowed: largest difference with which a check holds.
    """

    by: str
    what: str
    difference: float
    allowed: float


def inputs(
    config: vit.ViTConfig,
) -> tuple[Float[np.ndarray, "batch rows columns channels"], Float[np.ndarray, "batch patches"]]:
    """Images, one for each of IMAGES, and masking noise. Patches without any variance show a wrong epsilon best."""
    random = np.random.default_rng(0)
    images = random.standard_normal((len(IMAGES), *config.image_size, config.channels), np.float32)
    images[1, : config.image_size[0] // 2] = 0.5  # sums of it are exact in float32
    images[2] = 0.0
    return images, random.random((len(IMAGES), config.patches), np.float32)


def trained(config: mae.MAEConfig, params: Mapping[str, Any], *, decoder: bool) -> Results:
    """What the JAX model computes for `inputs`, in float32: features, and prediction, mask and loss with `decoder`.

    Raises:
      UserError: something is not finite.
    """
    config = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, dtype="float32", remat="none", unroll=1)
    )
    images, noise = (jnp.asarray(array) for array in inputs(config.encoder))

    @jax.jit
    def run(params: Any) -> dict[str, jax.Array]:
        results = {"features": vit.bind(config.encoder, params["encoder"])(images)}
        if decoder:
            output = mae.bind(config, params)(images, noise)
            results |= {"prediction": output.prediction, "mask": output.mask, "loss": output.loss}
        return results

    results = jax.device_get(run(params if decoder else {"encoder": params["encoder"]}))
    for what, values in results.items():
        if not np.isfinite(values).all():
            raise UserError(f"the checkpoint's {what} is not finite; convert an earlier one with --step")
    return results


def run(
    folder: Path, layout: Layout, config: mae.MAEConfig, wanted: Results, tensors: Mapping[str, np.ndarray]
) -> tuple[list[Check], dict[str, str]]:
    """All checks that this machine can run.

    Args:
      wanted: what `trained` gave.
      tensors: what was to be written.

    Returns:
      The checks that held, and the programs that were not run, each with its reason.

    Raises:
      CheckFailed: one did not hold.
    """
    images, noise = inputs(config.encoder)
    done = [same_file(folder, tensors), *by_numpy(folder, layout.name, images, noise, wanted)]
    not_run: dict[str, str] = {}
    if layout.for_transformers:
        packages, check = ("torch", "transformers"), by_transformers
    else:
        packages, check = ("torch", "timm"), by_timm
    try:
        for package in packages:
            _import(package)
        done += check(folder, layout.name, images, noise, wanted)
    except NotUsable as error:
        not_run[packages[-1]] = str(error)
    return done, not_run


# ---- comparing


def differences(found: Results, wanted: Results) -> dict[str, tuple[float, tuple[int, ...]]]:
    """For every array of `wanted`, the largest difference to the one of `found` and its place.

    The unit is max(1, |wanted|, root mean square of wanted), element by element; not finite counts as infinitely far.
    """
    worst = {}
    for what, values in wanted.items():
        result, values = np.asarray(found[what], np.float64), np.asarray(values, np.float64)
        if result.shape != values.shape:
            raise CheckFailed(f"{what} has the shape {result.shape}, that of the trained model {values.shape}")
        size = np.maximum(np.abs(values), max(1.0, math.sqrt(np.mean(np.square(values)))))
        difference = np.nan_to_num(np.abs(result - values) / size, nan=np.inf, posinf=np.inf)
        place = np.unravel_index(int(difference.argmax()), difference.shape)
        worst[what] = float(difference.max()), tuple(int(number) for number in place)
    return worst


def compare(by: str, found: Results, wanted: Results) -> list[Check]:
    """Every array of `wanted` against the one of `found`.

    Raises:
      CheckFailed: at least one differs by more than is allowed; the message has the worst of them.
    """
    held, failed = [], []
    for what, (worst, place) in differences(found, wanted).items():
        allowed = 0.0 if what == "mask" else TOLERANCE
        if worst <= allowed:
            held.append(Check(by, what, worst, allowed))
            continue
        where = ", ".join(f"{axis} {number}" for axis, number in zip(_AXES[what], place, strict=True))
        if place:
            where = f", at {where} (image {place[0]} is {IMAGES[place[0]]})"
        failed.append((worst, f"{what} by {worst:.1e}, allowed are {allowed:.0e}{where}"))
    if failed:
        raise CheckFailed(f"{by} and the trained model differ: {max(failed)[1]}")
    return held


# ---- the file itself


def same_file(folder: Path, tensors: Mapping[str, np.ndarray]) -> Check:
    """Every tensor of the file, bit by bit.

    Raises:
      CheckFailed: a name, type, shape or value is another.
    """
    written = safetensors.numpy.load_file(folder / WEIGHTS)
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        if file.metadata().get("format") != "pt":
            raise CheckFailed(f"{WEIGHTS} does not carry the metadata format=pt")
    if names := sorted(set(written) ^ set(tensors)):
        raise CheckFailed(f"{WEIGHTS}: {names[0]} is on one side alone, in the file or in the model")
    for name, values in tensors.items():
        found = written[name]
        if (found.dtype, found.shape) != (np.dtype(np.float32), values.shape):
            raise CheckFailed(f"{WEIGHTS}: {name} is {found.dtype} {found.shape}, wanted float32 {values.shape}")
        if not np.array_equal(found, values):
            raise CheckFailed(f"{WEIGHTS}: the values of {name} are not those that were to be written")
    return Check("file", "tensors", 0.0, 0.0)


# ---- NumPy


def by_numpy(folder: Path, layout: str, images: np.ndarray, noise: np.ndarray, wanted: Results) -> list[Check]:
    """The forward pass of numpy_forward.

    Raises:
      CheckFailed: it does not run, leaves tensors unused or computes something else.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = numpy_forward.Tensors(safetensors.numpy.load_file(folder / WEIGHTS))
    pixels = images.transpose(0, 3, 1, 2)
    try:
        found = {"features": numpy_forward.features(layout, config, tensors, pixels)}
        if "prediction" in wanted:
            found |= numpy_forward.reconstruction(config, tensors, pixels, noise)
    except KeyError as error:
        raise CheckFailed(f"NumPy finds no {error.args[0]!r} in {WEIGHTS} or {CONFIG}") from error
    except ValueError as error:
        raise CheckFailed(f"NumPy cannot run the model of {WEIGHTS} and {CONFIG}: {error}") from error
    unread = tensors.unread - ({"embeddings.mask_token"} if layout == "dinov2" else set())
    if unread:
        raise CheckFailed(f"{WEIGHTS} holds {sorted(unread)[0]}, which this layout has no use for")
    return compare("NumPy", found, wanted)


# ---- PyTorch


class NotUsable(Exception):
    """A package is missing or broken; the message says which and why."""


def _import(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotUsable(f"{package} is not installed")
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken installation may raise anything
        raise NotUsable(f"{package} cannot be imported: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def by_transformers(folder: Path, layout: str, images: np.ndarray, noise: np.ndarray, wanted: Results) -> list[Check]:
    """Loads the folder as its users do and runs it on the CPU in float32.

    Raises:
      CheckFailed: loading fails, a key is missing, unexpected or of another shape, or something else is computed.
      NotUsable: this installation has no such class to load.
    """
    import torch
    import transformers

    by = f"transformers {transformers.__version__}"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        target = {
            "vit_mae": transformers.ViTMAEForPreTraining, "vit": transformers.ViTModel,
            "dinov2": transformers.Dinov2Model,
        }[layout]  # fmt: skip
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotUsable(f"{by} cannot import its models: {_first_line(error)}") from error
    extra = {"add_pooling_layer": False} if layout == "vit" else {}
    try:
        model, info = target.from_pretrained(folder, output_loading_info=True, local_files_only=True, **extra)
    except Exception as error:  # the file is what is in question, and it may break a loader in any way
        raise CheckFailed(f"{by} cannot load the folder: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckFailed(f"{by} lists {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}")
    model = model.to("cpu", torch.float32).eval()
    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        if layout == "vit_mae":
            output = model(pixels, noise=torch.tensor(noise))
            found = {"prediction": output.logits, "mask": output.mask, "loss": output.loss}
            # Nothing masked and in the order of the image: the features.
            model.config.mask_ratio = 0.0
            everything = torch.arange(noise.shape[1], dtype=torch.float32).expand(noise.shape)
            found["features"] = model.vit(pixels, noise=everything).last_hidden_state
        else:
            found = {"features": model(pixels).last_hidden_state}
    results = {what: values.numpy() for what, values in found.items()}
    return [Check(by, "keys", 0.0, 0.0), *compare(by, results, wanted)]


def by_timm(folder: Path, layout: str, images: np.ndarray, noise: np.ndarray, wanted: Results) -> list[Check]:
    """Builds the model from config.json, loads it strictly and runs it on the CPU in float32.

    Raises:
      CheckFailed: loading fails, which a key too few or too many makes it do, or something else is computed.
    """
    import timm
    import torch
    from safetensors.torch import load_file

    by = f"timm {timm.__version__}"
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        model = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except Exception as error:  # as above
        raise CheckFailed(f"{by} cannot load the folder: {_first_line(error)}") from error
    with torch.no_grad():
        features = model.eval().forward_features(torch.tensor(images).permute(0, 3, 1, 2).contiguous())
    return [Check(by, "keys", 0.0, 0.0), *compare(by, {"features": features.numpy()}, wanted)]
