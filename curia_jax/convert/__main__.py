"""Converts a checkpoint to weights for PyTorch and checks that they compute what the trained model does.

A layout is the tensor names and the config.json that one class expects:
  vit_mae           ViTMAEForPreTraining of transformers: encoder and decoder, to reconstruct or to train on
  vit               ViTModel of transformers: the encoder, for features; takes images and patches that are not square
  dinov2            Dinov2Model of transformers: the encoder, for evaluators that load DINOv2
  timm              VisionTransformer of timm: the encoder
  vit_classifier    ViTForImageClassification of transformers: a fine-tuned run whose linear head pools CLS
  dinov2_classifier Dinov2ForImageClassification of transformers: one whose linear head pools CLS, the mean or both
  timm_classifier   VisionTransformer of timm with num_classes: one whose linear head pools CLS or the mean

The folder gets model.safetensors (float32), config.json, a model card and, for transformers, an image processor: its settings in
preprocessor_config.json, and its code.
It is read back and run in NumPy from its tensor names and config.json alone, and in PyTorch where that is installed.
Features (for vit_mae also prediction, mask and loss, for classifiers logits) have to agree with the JAX model to 1e-5, on images with and without
contrast, and the image processor with the training's view of a slice to 1e-4. Only then is the folder renamed to --output. Reads checkpoints of any mesh and needs no accelerator.
"""

import argparse
import dataclasses
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import curia_common
from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    from curia_jax.convert import card, checks
    from curia_jax.convert.folder import Json
    from curia_jax.convert.layouts import Layout
    from curia_jax.models import mae
    from curia_jax.models.params import Params
    from curia_jax.trained_model import TrainedModel

HU = {None: "auto", "auto": "auto", "true": True, "false": False}
LAYOUT_NAMES = ("vit_mae", "vit", "dinov2", "timm", "vit_classifier", "dinov2_classifier", "timm_classifier")
EXAMPLES = """
python -m curia_jax.convert --checkpoint=demo/run --output=weights/vit --layout=vit
python -m curia_jax.convert --checkpoint=demo/run --output=weights/dinov2 --layout=dinov2 --image-size=512
python -m curia_jax.convert --checkpoint=demo/run --output=weights/mae --layout=vit_mae --step=300 --json=mae.json
python -m curia_jax.convert --checkpoint=runs/ich --output=weights/ich --layout=vit_classifier,dinov2_classifier
"""

log = logs.get_logger(__name__)


def parser() -> cli.Parser:
    made = cli.parser("python -m curia_jax.convert", __doc__, examples=EXAMPLES, codes=(ExitCode.DATA,))
    made.add_argument(
        "--checkpoint", required=True, help="work directory of curia_jax.pretrain or finetune, or folder of a step"
    )
    made.add_argument(
        "--output",
        required=True,
        help="folder to write; one that this command wrote is replaced. Of several layouts each gets a folder of its name in it",
    )
    made.add_argument(
        "--layout",
        required=True,
        metavar="LAYOUT,…",
        help=f"which class is to load it: {', '.join(LAYOUT_NAMES)}; see above",
    )
    made.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    made.add_argument(
        "--image-size",
        metavar="N or HxW",
        help="compute the positions for images of this size in px (default: as trained)",
    )
    made.add_argument(
        "--hu",
        choices=("auto", "true", "false"),
        help="units that the image processor takes: HU (true), others such as MR (false), or by header and values "
        "(default: auto)",
    )
    made.add_argument(
        "--adapter",
        type=int,
        nargs="?",
        const=5,
        choices=(4, 5),
        help="of a run fine-tuned with LoRA: write the low-rank adapter alone, as peft reads it, for this version of transformers "
        "(5); without it the adapter is merged into the weights",
    )
    cli.add_json(
        made,
        "layout, step, examples_seen, encoder_sha256, image_size, version, files (name, bytes, sha256), tensors, parameters, "
        "checks (by, what, difference, allowed) and not_run (program: reason); of several layouts a list of these",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), convert, argv, stopped="stopped; nothing was written to --output")


def convert(args: argparse.Namespace) -> None:
    # On the CPU, whatever this machine has: accelerators multiply float32 with fewer digits.
    import jax

    jax.config.update("jax_platforms", "cpu")

    from curia_jax import trained_model
    from curia_jax.convert import adapter, card, checks, folder, layouts

    chosen = [layouts.LAYOUTS[name] for name in _layouts(args.layout)]
    output = Path(args.output).expanduser()
    outputs = [output] if len(chosen) == 1 else [output / layout.name for layout in chosen]
    image_size = _image_size(args.image_size)
    for path in outputs:
        folder.check_replaceable(path)
    if args.hu and not any(layout.for_transformers for layout in chosen):
        raise UserError(
            f"--hu sets the image processor of transformers, which --layout={args.layout} has not; leave it out"
        )

    if args.adapter and (other := [layout.name for layout in chosen if layout.name not in adapter.LAYOUTS]):
        raise UserError(f"--adapter is for --layout={' or '.join(adapter.LAYOUTS)}, not {other[0]}; leave it out there")

    # ---- what was trained
    trained = trained_model.load(args.checkpoint, args.step)
    if image_size:
        trained = dataclasses.replace(trained, config=_resized(trained.config, image_size))
    config = trained.config
    for layout in chosen:
        region = bool(trained.task.get("masked", False))
        layout.check(config, trained.head, decoder="decoder" in trained.params, region=region)
    if args.adapter and (trained.adapters is None or not trained.adapters.config.rank):
        raise UserError(
            f"--checkpoint={args.checkpoint} has no adapter: it was not fine-tuned with --config.finetune.train=lora; leave --adapter out"
        )
    encoder = config.encoder
    provenance = card.Provenance(
        run=trained.run_name, step=trained.step, examples_seen=trained.examples_seen,
        encoder_sha256=trained_model.digest(trained.params["encoder"]), version=curia_common.__version__,
        origin=trained.origin, task=trained.task.get("name"),
    )  # fmt: skip
    size, patch = ("x".join(map(str, pair)) for pair in (encoder.image_size, encoder.patch_size))
    log.info(
        f"step {trained.step:,}, {trained.examples_seen:,} examples seen: {encoder.depth} blocks of width {encoder.width}, "
        f"images of {size} px, patches of {patch}"
    )
    if any(layout.name == "dinov2" for layout in chosen) and (obstacle := layouts.evaluator_obstacle(config)):
        log.warning(obstacle)
    params = dict(trained.params)
    if trained.head is not None and trained.head_params is not None:
        params["head"] = trained.head_params
        if not any(layout.has_head for layout in chosen):
            log.info(f"the head stays behind: --layout={args.layout} holds the encoder alone")
    wanted = checks.run_jax(
        config, params, decoder=any(layout.has_decoder for layout in chosen),
        head_config=trained.head if any(layout.has_head for layout in chosen) else None,
    )  # fmt: skip

    # ---- written to temporary folders, checked, renamed
    made = [
        _write(path, layout, trained, params, provenance, wanted, hu=args.hu, adapter_for=args.adapter)
        for path, layout in zip(outputs, chosen, strict=True)
    ]
    cli.write_json(args.json, made[0] if len(made) == 1 else made)


def _write(
    output: Path, layout: "Layout", trained: "TrainedModel", params: "Params", provenance: "card.Provenance",
    wanted: "checks.Results", *, hu: str | None, adapter_for: int | None,
) -> "Json":  # fmt: skip
    """Writes and checks the folder of one layout; returns what --json says of it.

    Args:
      params: branches of the model, the head among them.
      wanted: from `checks.run_jax`, of all layouts.
      adapter_for: version of transformers for which the adapter alone is written; None for all weights.

    Raises:
      CheckFailed: the folder does not compute what the model does.
    """
    import numpy as np

    from curia_jax import trained_model
    from curia_jax.convert import adapter, card, checks, folder, layouts

    config, augment, encoder, head = trained.config, trained.augment, trained.config.encoder, None
    if layout.has_head and trained.head is not None:
        head, own = layout.own_head(trained.head, params["head"])
        params = {**params, "head": own}
    slices = int(trained.task.get("slices", 1))
    wanted = {what: values for what, values in wanted.items() if what in layout.computes}
    tensors, parameters = layouts.tensors(layout, config, params)
    lora, base_sha256, content = trained.adapters, None, None
    if adapter_for and lora is not None:
        tensors = adapter.tensors(layout, lora.config, lora.params, params["head"], adapter_for)
        parameters = sum(values.size for values in tensors.values())
        content = adapter.config_json(layout, lora.config, adapter_for)
        base_sha256 = trained_model.digest(lora.base_encoder)
    try:
        with folder.publish(output) as new:
            folder.write(
                new,
                tensors=tensors,
                metadata=card.safetensors_metadata(layout, encoder, augment, provenance),
                config=card.config_json(layout, config, augment, provenance, head, slices, base_sha256),
                preprocessor=card.preprocessor_json(augment, encoder, hu=HU[hu]) if layout.for_transformers else None,
                card=card.text(layout, config, augment, provenance, parameters, head, slices, base_sha256),
                adapter=content,
            )
            log.info(f"{len(tensors)} tensors written; reading them back and comparing with the JAX model")
            if adapter_for and lora is not None:
                names = adapter.renamed(layout, lora.config, encoder.depth, adapter_for)
                no_head = {name: np.zeros_like(values) for name, values in params["head"].items()}
                base, _ = layouts.tensors(layout, config, {"encoder": lora.base_encoder, "head": no_head})
                report = checks.run_adapter(
                    new, layout, base, names, wanted, tensors, checks.inputs(encoder), version=adapter_for
                )
            else:
                report = checks.run(new, layout, config, augment, wanted, tensors)
            files = [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(new.iterdir())
            ]
    except checks.CheckFailed as error:
        raise checks.CheckFailed(f"{error}. Nothing was written to {output}") from error

    log.info(_summary(report))
    total = sum(int(file["bytes"]) for file in files)
    log.info(f"{output}: {parameters / 1e6:.2f} M parameters, {total / 1e6:.1f} MB, for {layout.target}")
    return {
        "layout": layout.name, "step": trained.step, "examples_seen": trained.examples_seen,
        "encoder_sha256": provenance.encoder_sha256, "image_size": list(encoder.image_size),
        "version": provenance.version, "files": files, "tensors": len(tensors), "parameters": parameters,
        "checks": [dataclasses.asdict(check) for check in report.held], "not_run": dict(report.not_run),
    }  # fmt: skip


def _layouts(text: str) -> list[str]:
    """Names of layouts, each once."""
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    for name in names or [text]:
        if name not in LAYOUT_NAMES:
            raise UserError(f"--layout={text}: no layout {name!r}; there are {', '.join(LAYOUT_NAMES)}")
    return names


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if match is None:
        raise UserError(f"--image-size={text}: write a number of px, or height x width such as 384x512")
    return int(match[1]), int(match[2] or match[1])


def _resized(config: "mae.MAEConfig", size: tuple[int, int]) -> "mae.MAEConfig":
    """The model for images of another size, which changes the shape of no parameter."""
    try:
        return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, image_size=size))
    except ValueError as error:
        raise UserError(f"--image-size={'x'.join(map(str, size))}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summary(report: "checks.Report") -> str:
    """One line: which programs agreed, by how much, and which were not run."""
    by_program: dict[str, list[str]] = {}
    for check in report.held:
        figure = f"{check.what} {check.difference:.1e}" if check.allowed else f"{check.what} equal"
        by_program.setdefault(check.by, []).append(figure)
    parts = [f"{name} ({', '.join(figures)})" for name, figures in by_program.items()]
    parts += [f"NOT {name}: {reason}" for name, reason in report.not_run.items()]
    return "checked against the JAX model, largest differences: " + "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
