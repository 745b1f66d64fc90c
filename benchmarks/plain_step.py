"""Plans the baseline of docs/performance.md: a ViT-MAE train step as one writes it first.

The method, parameters, augmentation and optimizer are those of `curia_jax.pretrain`, in array operations alone, with automatic
derivatives: bf16 matmuls, float32 LayerNorm and softmax, exact GELU, the reference's decoder with 16 heads, gathers for the
mask, a scan over layers, replicated parameters. `loss` computes what `mae.MAE` computes (tests/benchmarks/test_plain_step.py).
A run that does not fit without rematerialisation is planned with it. Takes minutes each; the compiler's answers are cached.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curia_common import cli
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    import jax
    import ml_collections

    from curia_jax.models import mae, vit
    from curia_jax.objectives.mae import MAEObjective
    from curia_jax.plan.planner import Plan
    from curia_jax.plan.topologies import Topology

NAMED = [f"configs/pretrain_vit_{size}16_{px}.py" for px in (224, 512) for size in "blh"]
Params = Any  # nested dict of arrays


# ---- the model


def layer_norm(x: "jax.Array", p: "Params", eps: float) -> "jax.Array":
    import jax
    import jax.numpy as jnp

    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def linear(x: "jax.Array", p: "Params") -> "jax.Array":
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def block(x: "jax.Array", p: "Params", heads: int, eps: float, approximate: bool) -> "jax.Array":
    import jax
    import jax.numpy as jnp

    batch, tokens, width = x.shape
    with jax.named_scope("attention"):
        qkv = linear(layer_norm(x, p["norm1"], eps), p["attn"]["qkv"])
        q, k, v = (y.reshape(batch, tokens, heads, width // heads) for y in jnp.split(qkv, 3, axis=-1))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(x.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width)
        x = x + linear(y, p["attn"]["proj"])
    with jax.named_scope("mlp"):
        y = linear(layer_norm(x, p["norm2"], eps), p["mlp"]["fc1"])
        return x + linear(jax.nn.gelu(y, approximate=approximate), p["mlp"]["fc2"])


def blocks(x: "jax.Array", stack: "Params", heads: int, encoder: "vit.ViTConfig") -> "jax.Array":
    import jax

    def run(x: jax.Array, p: Params) -> jax.Array:
        return block(x, p, heads, encoder.layer_norm_eps, encoder.activation == "gelu_tanh")

    if encoder.remat == "full":
        run = jax.checkpoint(run, prevent_cse=False)
    return jax.lax.scan(lambda x, p: (run(x, p), None), x, stack)[0]


def loss(
    config: "mae.MAEConfig", params: "Params", images: "jax.Array", noise: "jax.Array"
) -> "tuple[jax.Array, jax.Array]":
    """Loss over the masked patches, and that of predicting zero."""
    import jax
    import jax.numpy as jnp

    from curia_jax.models import vit

    encoder, eps = config.encoder, config.encoder.layer_norm_eps
    dtype = jnp.dtype(encoder.dtype)
    with jax.named_scope("encoder"):
        p = params["encoder"]
        with jax.named_scope("patch_embed"):
            x = linear(vit.patchify(images, encoder.patch_size).astype(dtype), p["patch_embed"])
            x = x + vit.position_table(encoder.width, encoder.grid)[1:].astype(dtype)
        with jax.named_scope("mask"):
            shuffled = jnp.argsort(noise, axis=1)
            restore = jnp.argsort(shuffled, axis=1)
            x = jnp.take_along_axis(x, shuffled[:, : config.visible, None], axis=1)
        cls = jnp.broadcast_to(p["cls_token"].astype(dtype), (x.shape[0], 1, encoder.width))
        x = blocks(jnp.concatenate([cls, x], axis=1), p["blocks"], encoder.heads, encoder)
        with jax.named_scope("norm"):
            x = layer_norm(x, p["norm"], eps)
    with jax.named_scope("decoder"):
        p = params["decoder"]
        x = linear(x, p["embed"])
        hidden = encoder.patches - config.visible
        hidden = jnp.broadcast_to(p["mask_token"].astype(dtype), (x.shape[0], hidden, config.decoder_width))
        ordered = jnp.take_along_axis(jnp.concatenate([x[:, 1:], hidden], axis=1), restore[:, :, None], axis=1)
        x = jnp.concatenate([x[:, :1], ordered], axis=1)
        x = x + vit.position_table(config.decoder_width, encoder.grid).astype(dtype)
        x = blocks(x, p["blocks"], config.decoder_heads, encoder)
        with jax.named_scope("norm"):
            x = layer_norm(x, p["norm"], eps)
        with jax.named_scope("pred"):
            prediction = linear(x, p["pred"])[:, 1:].astype(jnp.float32)
    with jax.named_scope("loss"):
        target = vit.patchify(images.astype(jnp.float32), encoder.patch_size)
        if config.norm_pix:
            mean = jnp.mean(target, axis=-1, keepdims=True)
            variance = jnp.var(target, axis=-1, keepdims=True, ddof=1)
            target = (target - mean) / jnp.sqrt(variance + config.norm_pix_eps)
        mask = (restore >= config.visible).astype(jnp.float32)
        error = jnp.mean(jnp.square(prediction - target), axis=-1)
        baseline = jnp.mean(jnp.square(target), axis=-1)
        return jnp.sum(error * mask) / jnp.sum(mask), jnp.sum(baseline * mask) / jnp.sum(mask)


# ---- its train step


def objective_of(
    config: "ml_collections.ConfigDict", mesh: "jax.sharding.Mesh", *,
    canvas: tuple[int, int], warmup_steps: int, total_steps: int,
) -> "MAEObjective":  # fmt: skip
    """The objective of `curia_jax.objectives.mae.make` with the plain step in place of its own."""
    import jax
    import optax

    from curia_jax import augment, optimizer
    from curia_jax.objectives import mae
    from curia_jax.settings import Augment

    made = mae.make(config, mesh, canvas=canvas, warmup_steps=warmup_steps, total_steps=total_steps)
    model = made.model
    transform, rate = optimizer.make(
        config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
    )

    def step(state: Any, batch: augment.Batch) -> tuple[Any, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        view_key, mask_key = jax.random.split(key)
        with jax.named_scope("augment"):
            images = augment.training_view(batch, view_key, Augment.of(config.augment), model.encoder.image_size)
        noise = jax.random.uniform(mask_key, (images.shape[0], model.encoder.patches))
        of_params = jax.value_and_grad(lambda params: loss(model, params, images, noise), has_aux=True)
        (value, baseline), gradients = of_params(state["params"])
        with jax.named_scope("optimizer"):
            updates, opt_state = transform.update(gradients, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        metrics = {
            "loss": value,
            "baseline_loss": baseline,
            "learning_rate": rate(state["step"]),
            "gradient_norm": optax.global_norm(gradients),
            "parameter_norm": optax.global_norm(params),
        }
        return {**state, "step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return dataclasses.replace(made, step=step, compiler_options={})


def plain_config(file: str, topology: "Topology", remat: str) -> "ml_collections.ConfigDict":
    """A named config with the reference's decoder, exact GELU and replicated parameters."""
    from curia_jax import config as configs

    words = ("model.decoder_heads=16", "model.activation=gelu", f"model.remat={remat}")
    mesh = f"mesh.replica={topology.slices}", f"mesh.data={topology.devices // topology.slices}", "mesh.fsdp=1"
    return configs.load(file, [f"--config.{word}" for word in (*words, *mesh)])


def plan(file: str, topology: "Topology") -> "tuple[str, Plan]":
    """Plans the plain step of a config; returns its rematerialisation, "full" if it does not fit without, and the plan."""
    from curia_jax.plan import inputs, prices
    from curia_jax.plan.planner import Planner

    for remat in ("none", "full"):
        config = plain_config(file, topology, remat)
        found = Planner(topology, inputs.input_facts(config, None), prices.PRICES, objective_of).plan(config)
        if found.fits:
            break
    return remat, found


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python benchmarks/plain_step.py",
        __doc__,
        examples="python benchmarks/plain_step.py --config=configs/pretrain_vit_b16_224.py",
        codes=(ExitCode.DOES_NOT_FIT,),
    )
    made.add_argument("--config", action="append", metavar="FILE", help="may be repeated; the six named runs if absent")
    made.add_argument("--topology", default="v5e:16x16", metavar="CHIP:SHAPE")
    cli.add_json(made, "the plans")
    return made


def run(args: argparse.Namespace) -> ExitCode:
    from curia_jax.plan import topologies

    topologies.prepare_environment()
    topology = topologies.parse(args.topology)
    rows, fits = [], True
    print("| config | images per chip | remat | MFU | images/s/chip | GiB per chip | exposed communication |")
    print("|---|---|---|---|---|---|---|")
    for file in args.config or NAMED:
        remat, found = plan(file, topology)
        memory, step = f"{found.memory.total / 2**30:.1f}", found.step
        figures = (
            f"{step.estimated_mfu:.3f} | {step.images_per_second_per_chip:.0f} | {memory} | "
            f"{step.exposed_collective_fraction:.1%}"
            if step is not None
            else f"{'not estimated' if found.fits else 'does not fit'} | - | {memory} | -"
        )
        print(f"| {Path(file).stem} | {found.batch_size / topology.chips:g} | {remat} | {figures} |", flush=True)
        rows.append({"config": file, "remat": remat, **found.to_json()})
        fits = fits and found.fits
    cli.write_json(args.json, rows)
    return ExitCode.DONE if fits else ExitCode.DOES_NOT_FIT


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
