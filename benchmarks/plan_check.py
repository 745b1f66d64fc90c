"""Compares the planner's estimate with two runs that were made on a TPU pod and published.

affjljoo3581/deit3-jax trained DeiT III (Touvron et al. 2022) on 13,151,276 images of ImageNet-21k for 90 epochs with a batch of
2,048 on a TPU v4-64 (32 chips): ViT-B/16 in 12 h 12 min, ViT-L/16 in 37 h 13 min, everything included. This compiles a step of
the same shapes and arithmetic for v4:2x4x4 and prints the estimate beside the published rate. The step is this project's ViT
with what the published one has besides: float32 with the TPU's default matmul precision (one pass of bf16), tanh GELU, separate
matmuls for q, k and v, LayerScale, stochastic depth, CutMix, smoothed labels, clipped gradients, LAMB.

With --published=FOLDER, a checkout of deit3-jax, its own program is compiled instead: its modules and step, with its modules for
data and logs replaced by empty ones. Takes half an hour on 2 cores; the compiler's answers are cached.
"""

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from curia_common import cli
from curia_common.errors import DoesNotFitError
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    import jax

    from curia_jax.plan.estimator import StepEstimate
    from curia_jax.plan.topologies import Topology

# The published settings: config/deit3/in21k/deit3-{b,l}16-pt-224-in21k-90ep.sh of deit3-jax.
IMAGES, EPOCHS, CLASSES, BATCH, CHIPS = 13_151_276, 90, 19_167, 2048, 32
PUBLISHED_HOURS = {"B": 12 + 12 / 60, "L": 37 + 13 / 60}
DROP_PATH = {"B": 0.1, "L": 0.3}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
SMOOTHING, CLIP, DECAY, RATE = 0.1, 1.0, 0.02, 3e-3


def published_rate(size: str) -> float:
    """Images per second and chip of the published run."""
    return IMAGES * EPOCHS / (PUBLISHED_HOURS[size] * 3600) / CHIPS


Params = Any  # nested dict of arrays


class Step(NamedTuple):
    """A train step: (state, batch) -> (state, metrics), the shapes of its state, and the shape of its images."""

    function: Callable[..., Any]
    state: Any
    images: tuple[int, ...]


def own_step(size: str, mesh: "jax.sharding.Mesh") -> Step:
    """The train step of a DeiT III classifier made of this project's ViT."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import PartitionSpec as P

    from curia_jax.models import vit

    config = vit.config(size, image_size=224, channels=3, dtype="float32", activation="gelu_tanh")

    def weights(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    transform = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.scale_by_adam(),
        optax.add_decayed_weights(DECAY, mask=weights),
        optax.masked(optax.scale_by_trust_ratio(), mask=weights),  # LAMB
        optax.scale_by_learning_rate(RATE),
    )

    def init() -> Params:
        encoder = vit.init(config, jax.random.key(0))
        scales = jnp.full((2, config.depth, config.width), 1e-4)
        head = {"kernel": jnp.zeros((config.width, CLASSES)), "bias": jnp.zeros(CLASSES)}
        params = {"encoder": encoder, "scales": scales, "head": head}
        return {"params": params, "opt_state": transform.init(params), "step": jnp.zeros((), jnp.int32)}

    def attend(attention: vit.Attention, x: jax.Array) -> jax.Array:
        """Attention with separate matmuls for q, k and v, each with the heads as a dimension of its result."""
        heads = config.heads, config.width // config.heads
        parts = (jnp.split(array, 3, axis=-1) for array in (attention.qkv.kernel[...], attention.qkv.bias[...]))
        q, k, v = (
            jnp.einsum("btw,whd->bthd", x, kernel.reshape(-1, *heads)) + bias.reshape(heads)
            for kernel, bias in zip(*parts, strict=True)
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * heads[1] ** -0.5, k))
        return attention.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))

    def logits(params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
        model = vit.bind(config, params["encoder"])
        with jax.named_scope("encoder"):
            x = model.embed(images)
            cls = jnp.broadcast_to(model.cls_token[...], (x.shape[0], 1, config.width))
            x = jnp.concatenate([cls, x], axis=1)
            graph, stack = nnx.split(model.blocks)
            keep = 1 - DROP_PATH[size]
            kept = jax.random.bernoulli(key, keep, (2, config.depth, x.shape[0], 1, 1)).astype(x.dtype) / keep
            for layer in range(config.depth):  # unrolled, as the published program is
                block = nnx.merge(graph, jax.tree.map(lambda leaf, n=layer: leaf[n], stack))
                scales = kept[:, layer] * params["scales"][:, layer, None, None]
                with jax.named_scope("attention"):
                    x = x + scales[0] * attend(block.attn, block.norm1(x))
                with jax.named_scope("mlp"):
                    x = x + scales[1] * block.mlp(block.norm2(x))
        with jax.named_scope("loss"):
            return model.norm(x)[:, 0] @ params["head"]["kernel"] + params["head"]["bias"]

    def cutmix(images: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Yun et al. 2019, within a device's part of the batch."""
        keys = jax.random.split(key, 3)
        side = (1 - jax.random.uniform(keys[0])) ** 0.5  # uniform is the beta distribution of (1, 1)
        place = jnp.abs(jnp.linspace(0, 1, images.shape[1]) - jax.random.uniform(keys[1], (2, 1))) < side / 2
        kept = 1.0 - (place[0, :, None] & place[1])[None, :, :, None]
        share, order = kept.mean(), jax.random.permutation(keys[2], images.shape[0])
        return kept * images + (1 - kept) * images[order], share * targets + (1 - share) * targets[order]

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        drop, mix = jax.random.split(key)
        with jax.named_scope("augment"):
            images = (batch["images"].astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION)
            targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], CLASSES), SMOOTHING)
            split = P(mesh.axis_names)
            mixed = jax.shard_map(cutmix, in_specs=(split, split, P()), out_specs=split, check_vma=False)
            images, targets = mixed(images, targets, mix)
        found = logits(params, images, drop)
        with jax.named_scope("loss"):
            return jnp.mean(optax.softmax_cross_entropy(found, targets))

    def step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        key = jax.random.fold_in(jax.random.key(0), state["step"])
        found, gradients = jax.value_and_grad(loss)(state["params"], batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = transform.update(gradients, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, found

    return Step(step, jax.eval_shape(init), (BATCH, 224, 224, 3))


def published_step(size: str, mesh: "jax.sharding.Mesh", folder: Path) -> Step:
    """The train step in a checkout of deit3-jax."""
    import flax.linen as nn
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from curia_jax.models import vit

    # What the step does not use: types for annotations, and the modules that load data.
    empty = {"chex": {"Array": jax.Array, "ArrayTree": Any, "PRNGKey": Any}, "webdataset": {"gopen": None}}
    pixels = {
        "IMAGENET_DEFAULT_MEAN": np.asarray(MEAN, np.float32),
        "IMAGENET_DEFAULT_STD": np.asarray(DEVIATION, np.float32),
    }
    for name, contents in {**empty, "dataset": pixels}.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    # It was written for an older JAX: tree_map has moved, and pmap, replaced by shard_map, cannot compile for absent devices.
    # The beta distribution, here of (1, 1) and so uniform, is drawn by a loop whose trip count depends on data.
    pmean = jax.lax.pmean
    jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue] - a name of older versions
    jax.pmap = lambda function, **_: function
    jax.lax.pmean = lambda x, axis_name: pmean(x, mesh.axis_names)
    jax.random.beta = lambda key, a, b: jax.random.uniform(key)
    nn.Module.tabulate = lambda *_, **__: ""
    sys.path.insert(0, str(folder / "src"))
    import training  # pyright: ignore[reportMissingImports] - in the checkout

    width, depth, heads = vit.SIZES[size]
    settings = types.SimpleNamespace(
        layers=depth, dim=width, heads=heads, labels=CLASSES, layerscale=True, patch_size=16, image_size=224,
        posemb="learnable", pooling="cls", dropout=0.0, droppath=DROP_PATH[size], grad_ckpt=False, mixup=0.0, cutmix=1.0,
        label_smoothing=SMOOTHING, criterion="ce", init_seed=0, mixup_seed=0, dropout_seed=0, pretrained_ckpt=None,
        grad_accum=1, optimizer="lamb", adam_b1=0.9, adam_b2=0.999, adam_eps=1e-8, weight_decay=DECAY, lr_decay=1.0,
        clip_grad=CLIP, learning_rate=RATE, warmup_steps=IMAGES * 5 // BATCH, training_steps=IMAGES * EPOCHS // BATCH,
    )  # fmt: skip
    split = P(mesh.axis_names)

    def step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
        run = jax.shard_map(training.training_step, in_specs=(P(), split), out_specs=P(), check_vma=False)
        return run(state, (batch["images"], batch["labels"]))

    return Step(step, jax.eval_shape(lambda: training.create_train_state(settings)), (BATCH, 3, 224, 224))


def trace(step: Step, mesh: "jax.sharding.Mesh") -> "jax.stages.Traced":
    """The step, traced for the mesh with replicated parameters."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from curia_jax import sharding

    replicated, split = NamedSharding(mesh, P()), sharding.batch_sharding(mesh)
    state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), step.state)
    batch = {
        "images": jax.ShapeDtypeStruct(step.images, jnp.uint8, sharding=split),
        "labels": jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=split),
    }
    with jax.set_mesh(mesh):
        function = jax.jit(step.function, donate_argnums=0, out_shardings=(replicated, replicated))
        return function.trace(state, batch)


def check(size: str, topology: "Topology", published: Path | None = None) -> "StepEstimate":
    """The estimate of a step.

    Raises:
      DoesNotFitError: it needs more memory than the topology has.
    """
    from curia_jax import sharding
    from curia_jax.models import vit
    from curia_jax.plan import compiler, estimator, flops, topologies

    mesh = sharding.make_mesh(data=topology.devices, devices=topologies.devices(topology))
    traced = trace(own_step(size, mesh) if published is None else published_step(size, mesh, published), mesh)
    compiled = compiler.compile_for(topology, traced)
    if compiled.refused:
        raise DoesNotFitError(f"ViT-{size}/16 does not fit {topology}: {dict(compiled.memory)} bytes per chip")
    config = vit.config(size, channels=3)
    return estimator.estimate(
        compiled.text,
        topology,
        mesh,
        batch_size=BATCH,
        model_flops=3 * (vit.flops(config) + 2 * config.width * CLASSES) * BATCH,
        hardware_flops=flops.hardware_flops(traced).total,
        pallas_flops=flops.pallas_flops(traced),
    )


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python benchmarks/plan_check.py",
        __doc__,
        examples="python benchmarks/plan_check.py --size=B\npython benchmarks/plan_check.py --published=deit3-jax",
        codes=(ExitCode.DOES_NOT_FIT,),
    )
    made.add_argument("--size", choices=sorted(PUBLISHED_HOURS), help="one of the two; both unless given")
    made.add_argument("--published", type=Path, metavar="FOLDER", help="compile the deit3-jax in this folder instead")
    cli.add_json(made, "the figures")
    return made


def run(args: argparse.Namespace) -> None:
    from curia_jax.plan import topologies

    topologies.prepare_environment()
    topology = topologies.parse("v4:2x4x4")
    program = "deit3-jax" if args.published else "this project's ViT"
    print("| model | published, images/s/chip | computation alone | ratio | with communication | ratio | step ms |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for size in [args.size] if args.size else sorted(PUBLISHED_HOURS):
        found, measured = check(size, topology, args.published), published_rate(size)
        rate = BATCH / CHIPS / found.compute_seconds
        print(
            f"| ViT-{size}/16, {program} | {measured:.0f} | {rate:.0f} | {rate / measured:.3f} | "
            f"{found.images_per_second_per_chip:.0f} | {found.images_per_second_per_chip / measured:.3f} | "
            f"{found.compute_seconds * 1e3:.1f} + {found.exposed_collective_seconds * 1e3:.1f} |",
            flush=True,
        )
        rows.append(
            {
                "size": size,
                "program": program,
                "computation_images_per_second_per_chip": rate,
                "published_images_per_second_per_chip": measured,
                "computation_ratio": rate / measured,
                "ratio": found.images_per_second_per_chip / measured,
                **dataclasses.asdict(found),
            }
        )
    cli.write_json(args.json, rows)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
