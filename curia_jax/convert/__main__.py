"""Turns a checkpoint into weights for PyTorch, and checks on the spot that they are the trained model.

A layout is the tensor names and the config.json that one class expects:
  vit_mae   ViTMAEForPreTraining of transformers: encoder and decoder, to reconstruct or to train on
  vit       ViTModel of transformers: the encoder, for features; takes images and patches that are not square
  dinov2    Dinov2Model of transformers: the encoder, for evaluators that load DINOv2
  timm      VisionTransformer of timm: the encoder

The folder gets model.safetensors (float32), config.json, a model card and, for transformers, preprocessor_config.json.
It is then read back and run in NumPy by the names of the layout alone, and in PyTorch where that is installed, on
images with and without contrast; features (and for vit_mae the prediction, mask and loss) have to agree with the JAX
model to 1e-5. Only then does it appear under its name. Reads checkpoints of any mesh and needs no accelerator.

exit codes:
  0   written and checked
  1   the written weights do not compute what the model does; nothing is left
  2   wrong usage, or a model that the layout cannot hold; nothing was changed
"""

import argparse
import dataclasses
import hashlib
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

LAYOUT_NAMES = ("vit_mae", "vit", "dinov2", "timm")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m curia_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m curia_jax.convert --checkpoint=demo/run --output=weights/vit --layout=vit
  python -m curia_jax.convert --checkpoint=demo/run --output=weights/dinov2 --layout=dinov2 --image-size=512
  python -m curia_jax.convert --checkpoint=demo/run --output=weights/mae --layout=vit_mae --step=300 --json=mae.json

--json has layout, step, examples_seen, encoder_sha256, image_size, files (name, bytes, sha256), tensors, parameters,
  checks (by, what, difference, allowed) and not_run (program: reason).""",
    )
    parser.add_argument("--checkpoint", required=True, help="work directory of curia_jax.pretrain, or folder of a step")
    parser.add_argument("--output", required=True, help="folder to write; one that this command wrote is replaced")
    parser.add_argument("--layout", required=True, choices=LAYOUT_NAMES, help="for which class; see above")
    parser.add_argument("--step", type=int, help="checkpoint of this step; the newest unless given")
    parser.add_argument(
        "--image-size", metavar="N or HxW",
        help="compute the positions for images of this size in px; the one of the training unless given",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write what was written and checked here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    # On the CPU, whatever this machine has: accelerators multiply float32 with fewer digits.
    import jax

    jax.config.update("jax_platforms", "cpu")

    from curia_common.errors import UserError
    from curia_jax.convert.checks import CheckFailed

    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"error: {error}. Nothing was written to {args.output}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Converts one checkpoint; returns what --json gets."""
    from curia_common.errors import UserError
    from curia_jax import checkpoint
    from curia_jax.convert import card, checks, folder, layouts
    from curia_jax.evaluate.features import digest

    layout, output = layouts.LAYOUTS[args.layout], Path(args.output).expanduser()
    folder.check_replaceable(output)
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json={args.json}: there is no folder {Path(args.json).parent}")

    # ---- what was trained
    loaded = checkpoint.load(args.checkpoint, args.step)
    config = _model(loaded, args.image_size)
    layout.check(config)
    steps = card.recipe(loaded.config.get("augment") or {}, config.encoder)
    provenance = {
        "run": _run_name(Path(loaded.path)), "step": loaded.step, "examples_seen": loaded.examples_seen,
        "encoder_sha256": digest(loaded.params["encoder"]),
    }  # fmt: skip
    encoder = config.encoder
    size, patch = ("x".join(map(str, pair)) for pair in (encoder.image_size, encoder.patch_size))
    say(
        f"step {loaded.step:,}, {loaded.examples_seen:,} examples seen: {encoder.depth} blocks of width {encoder.width}, "
        f"images of {size} px, patches of {patch}"
    )
    wanted = checks.trained(config, loaded.params, decoder="decoder" in layout.parts)

    # ---- written, checked, published
    tensors, parameters = layouts.tensors(layout, config, loaded.params)
    own = {
        "layout": layout.name,
        **provenance,
        "image_size": list(encoder.image_size),
        "gelu": card.GELU[encoder.activation],
    }
    header = {
        **own, "patch_order": card.PATCH_ORDER, "hu_window": steps["hu_window"], "image_mean": steps["image_mean"],
        "image_std": steps["image_std"], "layer_norm_eps": encoder.layer_norm_eps,
    }  # fmt: skip
    content = layout.config(config) | {folder.OWN: own}
    if not layout.for_transformers:
        content["pretrained_cfg"] |= card.timm_input(steps)
        content[folder.OWN] = own | {"preprocessing": steps}
    with folder.publish(output) as new:
        folder.write(
            new,
            tensors=tensors,
            metadata={key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()},
            config=content,
            preprocessor=card.preprocessor(steps) if layout.for_transformers else None,
            card=card.text(layout, config, steps, provenance, parameters),
        )
        say(f"{len(tensors)} tensors written; now read back and run beside the JAX model")
        held, not_run = checks.run(new, layout, config, wanted, tensors)
        files = [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(new.iterdir())
        ]

    total = sum(file["bytes"] for file in files)
    say(_summary(held, not_run))
    say(f"{output}: {parameters / 1e6:.2f} M parameters, {total / 1e6:.1f} MB, for {layout.target}")
    result = {
        "layout": layout.name, "step": loaded.step, "examples_seen": loaded.examples_seen,
        "encoder_sha256": provenance["encoder_sha256"], "image_size": list(encoder.image_size), "files": files,
        "tensors": len(tensors), "parameters": parameters, "checks": [dataclasses.asdict(check) for check in held],
        "not_run": not_run,
    }  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _model(loaded: Any, image_size: str | None) -> Any:
    """The checkpoint's model, for images of another size if one is given: no parameter depends on the size."""
    from curia_common.errors import UserError
    from curia_jax.models import mae

    settings = dict(loaded.config["model"])
    try:
        mae.bind(mae.config(**settings), loaded.params)
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not hold the model of its config: {error}") from error
    if image_size is not None:
        match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", image_size)
        if match is None:
            raise UserError(f"--image-size={image_size}: write a number of px, or height x width such as 384x512")
        settings["image_size"] = (int(match[1]), int(match[2] or match[1]))
    try:
        return mae.config(**settings)
    except ValueError as error:
        raise UserError(f"--image-size={image_size}: {error}") from error


def _run_name(step: Path) -> str | None:
    """Name of the work directory that a step's folder lies in; None where it was copied out of it."""
    from curia_jax.checkpoint import FOLDER

    return step.parent.parent.name if step.parent.name == FOLDER else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summary(held: list[Any], not_run: dict[str, str]) -> str:
    """One line: who agreed, by how much, and who was not asked."""
    by: dict[str, list[str]] = {}
    for check in held:
        figure = f"{check.what} {check.difference:.1e}" if check.allowed else f"{check.what} equal"
        by.setdefault(check.by, []).append(figure)
    parts = [f"{name} ({', '.join(figures)})" for name, figures in by.items()]
    parts += [f"NOT {name}: {reason}" for name, reason in not_run.items()]
    return "checked against the JAX model, largest differences: " + "; ".join(parts)


if __name__ == "__main__":
    # Like Ctrl-C, a request to stop leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
