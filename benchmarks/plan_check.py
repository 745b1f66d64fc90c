"""Holds the planner's estimate to two runs that were made on a real pod and published.

affjljoo3581/deit3-jax trained DeiT III (Touvron et al. 2022) on 13,151,276 images of ImageNet-21k for 90 epochs in batches of 2,048 on
a TPU v4-64 (32 chips): ViT-B/16 in 12 h 12 min, ViT-L/16 in 37 h 13 min, everything included. This compiles a step of the same
shapes, made of this project's own ViT (LayerScale, stochastic depth and LAMB added here, since the project trains without them),
for v4:2x4x4 and prints the estimate beside the published rate.

Usage: python benchmarks/plan_check.py [--size=B] [--json=FILE]. Half an hour on 2 cores; the compiler's answers are kept.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from curia_jax.plan import topology as topologies

IMAGES, EPOCHS, CLASSES, BATCH, CHIPS = 13_151_276, 90, 21_841, 2048, 32
PUBLISHED_HOURS = {"B": 12 + 12 / 60, "L": 37 + 13 / 60}
DROP_PATH = {"B": 0.1, "L": 0.3}


def published_rate(size: str) -> float:
    """Images per second and chip of the published run."""
    return IMAGES * EPOCHS / (PUBLISHED_HOURS[size] * 3600) / CHIPS


def trace(size: str, topology: topologies.Topology) -> tuple[Any, Any]:
    """The train step of a DeiT III classifier, traced for the topology; and its mesh."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from curia_jax import sharding
    from curia_jax.models import vit

    config = vit.config(size, image_size=224, channels=3, dtype="bfloat16")
    transform = optax.lamb(3e-3, weight_decay=0.02)

    def init(key: jax.Array) -> dict[str, Any]:
        encoder = vit.init(config, key)
        scales = jnp.full((2, config.depth, config.width), 1e-4)
        head = {"kernel": jnp.zeros((config.width, CLASSES)), "bias": jnp.zeros(CLASSES)}
        params = {"encoder": encoder, "scales": scales, "head": head}
        return {"params": params, "opt_state": transform.init(params), "step": jnp.zeros((), jnp.int32)}

    def logits(params: dict[str, Any], images: jax.Array, key: jax.Array) -> jax.Array:
        model = vit.bind(config, params["encoder"])
        x = model.embed(images)
        cls = jnp.broadcast_to(model.cls_token[...].astype(x.dtype), (x.shape[0], 1, config.width))
        x = jnp.concatenate([cls, x], axis=1)
        graph, stack = nnx.split(model.blocks)
        keep = 1 - DROP_PATH[size]
        kept = jax.random.bernoulli(key, keep, (2, config.depth, x.shape[0], 1, 1)).astype(x.dtype) / keep
        scales = params["scales"].astype(x.dtype)
        for layer in range(config.depth):  # unrolled, as the published program is
            block = nnx.merge(graph, jax.tree.map(lambda leaf, n=layer: leaf[n], stack))
            x = x + kept[0, layer] * scales[0, layer] * block.attn(block.norm1(x))
            x = x + kept[1, layer] * scales[1, layer] * block.mlp(block.norm2(x))
        x = model.norm(x)[:, 0].astype(jnp.float32)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    def step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        drop, mix = jax.random.split(jax.random.fold_in(jax.random.key(0), state["step"]))
        images = (batch["images"].astype(jnp.float32) / 255 - 0.5) / 0.25
        targets = jax.nn.one_hot(batch["labels"], CLASSES)
        # Uniform instead of beta-distributed: drawing a beta repeats until it accepts, a loop of which nobody can count the trips.
        share = jax.random.uniform(mix)
        images = share * images + (1 - share) * images[::-1]
        targets = share * targets + (1 - share) * targets[::-1]

        def loss_of(params: dict[str, Any]) -> jax.Array:
            found = logits(params, images, drop)
            return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(found, targets), axis=-1))

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        updates, opt_state = transform.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss

    mesh = sharding.make_mesh(data=topology.devices, devices=topologies.devices(topology))
    whole, split = NamedSharding(mesh, P()), sharding.batch_sharding(mesh)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), shapes)
    batch = {
        "images": jax.ShapeDtypeStruct((BATCH, 224, 224, 3), jnp.uint8, sharding=split),
        "labels": jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=split),
    }
    with jax.set_mesh(mesh):
        traced = jax.jit(step, donate_argnums=0, out_shardings=(whole, whole)).trace(state, batch)
    return traced, mesh


def check(size: str) -> dict[str, Any]:
    """The estimate beside the published rate."""
    from curia_jax.models import vit
    from curia_jax.plan import compile as compiling
    from curia_jax.plan import estimate, hlo, report

    topology = topologies.parse("v4:2x4x4")
    traced, mesh = trace(size, topology)
    with report.waiting(f"compiling ViT-{size}/16 for {topology}", None):
        compiled = compiling.compile(traced, topology, argument_bytes=0)
    if not compiled.text:
        raise SystemExit(f"ViT-{size}/16 does not fit {topology}: {compiled.memory}")
    wiring = estimate.Wiring.of(mesh, topology)
    hardware, kernels = compiling.hardware_flops(traced)
    config = vit.config(size, channels=3)
    found = estimate.estimate(
        hlo.account(hlo.parse(compiled.text), estimate.link_time(wiring)),
        wiring,
        batch_size=BATCH,
        model_flops=3 * (vit.flops(config) + 2 * config.width * CLASSES) * BATCH,
        hardware_flops=hardware,
        kernel_flops=kernels,
    )
    published = published_rate(size)
    names = ("compute_seconds", "exposed_collective_seconds", "unestimated_fraction", "estimated_mfu")
    return {
        "size": size,
        "estimated_images_per_second_per_chip": found["images_per_second_per_chip"],
        "published_images_per_second_per_chip": published,
        "ratio": found["images_per_second_per_chip"] / published,
        **{name: found[name] for name in names},
        "compile_seconds": compiled.seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PUBLISHED_HOURS), help="one of the two; both unless given")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    topologies.prepare_environment()
    rows = [check(size) for size in ([args.size] if args.size else sorted(PUBLISHED_HOURS))]
    print(
        "| model | estimate, images/s/chip | published | estimate / published | step ms: computation + exposed communication |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| ViT-{row['size']}/16 | {row['estimated_images_per_second_per_chip']:.0f} | "
            f"{row['published_images_per_second_per_chip']:.0f} | {row['ratio']:.3f} | "
            f"{row['compute_seconds'] * 1e3:.1f} + {row['exposed_collective_seconds'] * 1e3:.1f} |"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
