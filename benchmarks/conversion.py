"""Prints the figures of docs/convert.md.

  python -m benchmarks.conversion --size=B --image-size=224 --patch-size=16     layouts against the JAX model
  python -m benchmarks.conversion --mistakes --channels=3                       mistakes, and whether the checks detect them

Weights are random: for the layouts as the parity tests draw them, none zero or one; for the mistakes the initial weights
of a run.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from curia_jax import config as configs
from curia_jax.convert import __main__ as convert
from curia_jax.convert import checks, folder, layouts, numpy_forward
from curia_jax.models import mae
from tests import checkpoints
from tests.convert.mistakes import MISTAKES, spoil
from tests.models import make_references as reference

Model = Mapping[str, Any]  # arguments of mae.config
ENCODERS = {name: layout for name, layout in layouts.LAYOUTS.items() if not layout.has_head}


def layout_table(model: Model, place: Path) -> None:
    """Converts one checkpoint with the command and prints the results of its checks."""
    params = reference.random_params(mae.config(**model), seed=1)
    demo: Any = configs.load("demo")
    plain = {"model": model, "augment": json.loads(demo.augment.to_json()), "seed": 0}
    checkpoints.save(place / "run", {1: {"params": params}}, config=plain)
    print("| Layout | Checked by | Features | Prediction | Loss | Whole command, s |\n|---|---|---|---|---|---|")
    for layout in ENCODERS:
        words = [f"--checkpoint={place / 'run'}", f"--output={place / layout}", f"--layout={layout}"]
        began = time.perf_counter()
        if convert.main([*words, f"--json={place / 'result.json'}"]):
            sys.exit(1)
        seconds = time.perf_counter() - began
        result = json.loads((place / "result.json").read_text())
        found = {(check["by"], check["what"]): check["difference"] for check in result["checks"]}
        for by in dict.fromkeys(by for by, what in found if what == "features"):
            figures = [
                f"{found[by, what]:.1e}" if (by, what) in found else "" for what in ("features", "prediction", "loss")
            ]
            print(f"| `{layout}` | {by} | {' | '.join(figures)} | {seconds:.0f} |", flush=True)


def mistake_table(model: Model, place: Path) -> None:
    """Applies each mistake to a finished folder and prints the differences that it makes."""
    config = mae.config(**model)
    params = jax.device_get(mae.init(config, jax.random.key(0)))
    wanted = checks.run_jax(config, params, decoder=True)
    inputs = checks.inputs(config.encoder)
    pixels = inputs.images.transpose(0, 3, 1, 2)
    for name, layout in ENCODERS.items():
        (place / name).mkdir()
        tensors, _ = layouts.tensors(layout, config, params)
        folder.write(
            place / name, tensors=tensors, metadata={}, config=layout.config(config), preprocessor=None, card=""
        )
    print("| Mistake | Layout | Features | Prediction | Loss | Detected |\n|---|---|---|---|---|---|")
    nothing = {"none": (lambda tensors, config: None, ("vit_mae", "dinov2", "timm"), "")}
    for number, (mistake, (change, among, _)) in enumerate((nothing | MISTAKES).items()):
        for name in among if mistake == "none" else among[:1]:
            spoilt = spoil(place / name, place / f"{number}{name}", change)
            content = json.loads((spoilt / folder.CONFIG).read_text())
            tensors = numpy_forward.Tensors(safetensors.numpy.load_file(spoilt / folder.WEIGHTS))
            figures = {"features": "", "prediction": "", "loss": ""}
            try:
                settings = numpy_forward.read_settings(name, content)
                found = {"features": numpy_forward.features(name, settings, tensors, pixels)}
                if name == "vit_mae":
                    found |= numpy_forward.reconstruction(settings, tensors, pixels, inputs.noise)
                compared = checks.differences(found, {what: wanted[what] for what in found})
                figures |= {what: f"{worst:.1e}" for what, (worst, _) in compared.items() if what in figures}
            except (KeyError, ValueError):
                pass
            try:
                of_layout = {k: v for k, v in wanted.items() if k == "features" or name == "vit_mae"}
                checks.compare_numpy(spoilt, name, inputs, of_layout)
                detected = "no"
            except checks.CheckFailed as error:
                detected = "by the difference" if "differ" in str(error) else "by names or shapes"
            print(f"| {mistake} | `{name}` | {' | '.join(figures.values())} | {detected} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="Ti")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--mistakes", action="store_true")
    args = parser.parse_args()
    model = {
        "size": args.size, "image_size": [args.image_size] * 2, "patch_size": [args.patch_size] * 2,
        "channels": args.channels, "dtype": "float32",
    }  # fmt: skip
    print(
        f"ViT-{args.size}, {args.image_size} px, patches of {args.patch_size}, channels: {args.channels}; "
        f"jax {jax.__version__}, numpy {np.__version__}, {os.cpu_count()} CPU cores\n"
    )
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as place:
        (mistake_table if args.mistakes else layout_table)(model, Path(place))


if __name__ == "__main__":
    main()
