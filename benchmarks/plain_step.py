"""The baseline that docs/performance.md compares with: a ViT-MAE train step as one writes it first, and its plan.

The same method, parameters, augmentation and optimizer as `curia_jax.pretrain`, in array operations alone, with automatic
derivatives: bf16 products, float32 LayerNorm and softmax, exact GELU, the reference's decoder with 16 heads, gathers for the
mask, a scan over the layers, parameters copied to every device. `loss` computes what `mae.MAE` computes (tests/benchmarks).

Usage: python benchmarks/plain_step.py [--config=FILE ...] [--topology=v5e:16x16] [--json=FILE]. Compiles for minutes each; the
compiler's answers are kept. Where the step does not fit without rematerialisation, it is planned with.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curia_jax.plan import topology as topologies

NAMED = [f"configs/pretrain_vit_{size}16_{px}.py" for px in (224, 512) for size in "blh"]


# ---- the model


def layer_norm(x: Any, p: Mapping[str, Any], eps: float) -> Any:
    import jax
    import jax.numpy as jnp

    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def linear(x: Any, p: Mapping[str, Any]) -> Any:
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def block(x: Any, p: Mapping[str, Any], heads: int, eps: float, approximate: bool) -> Any:
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


def blocks(x: Any, stack: Any, heads: int, encoder: Any) -> Any:
    import jax

    def run(x: Any, p: Any) -> Any:
        return block(x, p, heads, encoder.layer_norm_eps, encoder.activation == "gelu_tanh")

    if encoder.remat == "full":
        run = jax.checkpoint(run, prevent_cse=False)
    return jax.lax.scan(lambda x, p: (run(x, p), None), x, stack)[0]


def loss(config: Any, params: Mapping[str, Any], images: Any, noise: Any) -> tuple[Any, Any]:
    """Loss over the hidden patches, and that of predicting nothing but the mean."""
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


def objective_of(config: Any, mesh: Any, *, canvas: tuple[int, int], warmup_steps: int, total_steps: int) -> Any:
    """As objective.make, with the plain step."""
    import jax
    import optax

    from curia_jax import augment, optimizer
    from curia_jax.objectives import mae as objective

    made = objective.make(config, mesh, canvas=canvas, warmup_steps=warmup_steps, total_steps=total_steps)
    model = made.model
    transform, rate = optimizer.make(
        config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
    )

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        view_key, mask_key = jax.random.split(key)
        with jax.named_scope("augment"):
            images = augment.training_view(batch, view_key, config.augment, model.encoder.image_size)
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
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return dataclasses.replace(made, step=step, compiler_options={})


def plain(config: Any, topology: topologies.Topology) -> Any:
    """A named config with the reference's decoder, exact GELU and parameters on every device of the topology."""
    config.model.decoder_heads = 16
    config.model.activation = "gelu"
    config.model.remat = "none"
    config.mesh.update({"replica": topology.slices, "data": topology.devices // topology.slices, "fsdp": 1})
    return config


def plan(file: str, topology: topologies.Topology) -> dict[str, Any]:
    """Plans the plain step of a config; with rematerialisation if it does not fit without."""
    from curia_jax import config as configs
    from curia_jax.plan import __main__ as command
    from curia_jax.plan import search
    from curia_jax.plan.estimator import estimate

    config = plain(configs.load(file), topology)
    planner = search.Planner(topology, command.input_facts(config, None), estimate.PRICES, objective_of)
    for remat in ("none", "full"):
        config.model.remat = remat
        found = planner.plan(config)
        if found["fits"]:
            break
    return {"config": file, "remat": remat} | found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="may be repeated; the six named ones if absent"
    )
    parser.add_argument("--topology", default="v5e:16x16", metavar="CHIP:SHAPE")
    parser.add_argument("--json", metavar="FILE", help="write the plans here")
    args = parser.parse_args()
    topologies.prepare_environment()
    topology = topologies.parse(args.topology)
    rows = []
    print("| config | images per chip | remat | MFU | images/s/chip | GiB per chip | exposed communication |")
    print("|---|---|---|---|---|---|---|")
    for file in args.config or NAMED:
        rows.append(plan(file, topology))
        row = rows[-1]
        figures = (
            f"{row['estimated_mfu']:.3f} | {row['images_per_second_per_chip']:.0f} | "
            f"{row['hbm_bytes_per_chip'] / 2**30:.1f} | {row['exposed_collective_fraction']:.1%}"
            if row["fits"]
            else f"does not fit | - | {row['hbm_bytes_per_chip'] / 2**30:.1f} | -"
        )
        print(f"| {Path(file).stem} | {row['batch_per_chip']:g} | {row['remat']} | {figures} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
