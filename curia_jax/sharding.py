"""The mesh, the table from parameter path to PartitionSpec, and explicit gradient all-reduces between TPU slices.

Mesh axes, outermost first:
  replica  between TPU slices, over the data-centre network: parameters are copied, gradients are summed.
  data     within a TPU slice: parameters are copied, gradients are summed.
  fsdp     within a TPU slice: parameters, gradients and optimizer moments are split.
The batch is split over all three.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import PyTree

from curia_common.errors import UserError

AXES = ("replica", "data", "fsdp")

# Pattern of a whole parameter path ("encoder/blocks/mlp/fc1/kernel") and the PartitionSpec of its dimensions; the first match
# applies.
Rules = Sequence[tuple[str, P]]


def block_rules(prefix: str) -> Rules:
    """Rows of stacked transformer blocks and the norm after them (models/vit.py), below the path `prefix`.

    Kernels are split along their input features. The first dimension is the layer and is never split: a scan over a split
    dimension would gather it in every iteration.
    """
    return (
        (rf"{prefix}/blocks/(attn/qkv|attn/proj|mlp/fc1|mlp/fc2)/kernel", P(None, "fsdp", None)),
        (rf"{prefix}/blocks/(attn/qkv|attn/proj|mlp/fc1|mlp/fc2)/bias", P()),
        (rf"{prefix}/blocks/norm[12]/(scale|bias)", P()),
        (rf"{prefix}/norm/(scale|bias)", P()),
    )


def encoder_rules(prefix: str) -> Rules:
    """Rows of a whole vit.ViT below the path `prefix`."""
    return (
        *block_rules(prefix),
        (rf"{prefix}/patch_embed/kernel", P(None, "fsdp")),
        (rf"{prefix}/patch_embed/bias|{prefix}/cls_token", P()),
    )


def make_mesh(
    replica: int = 1,
    data: int = -1,
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] - a class, which JAX's stub hides
) -> Mesh:
    """Arranges the devices as (replica, data, fsdp).

    Args:
      replica, data, fsdp: axis sizes; one of them may be -1 and takes the remaining devices.
      devices: all devices of the run unless given.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `replica` is not the number of TPU slices; the message
        has a mesh that fits.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    sizes = [replica, data, fsdp]
    fixed = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    wrong_slices = sizes[0] != slices and (slices > 1 or devices[0].platform == "tpu")
    if min(sizes) < 1 or math.prod(sizes) != len(devices) or wrong_slices:
        inner = len(devices) // slices
        near = math.gcd(inner, max(1, fsdp))
        raise UserError(
            f"mesh replica={replica}, data={data}, fsdp={fsdp} does not fit {len(devices)} devices"
            f"{f' in {slices} TPU slices' if slices > 1 else ''}; set --config.mesh.replica={slices} "
            f"--config.mesh.data={inner // near} --config.mesh.fsdp={near}"
        )
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh(
            (1, sizes[1], sizes[2]), (sizes[0], 1, 1), devices=devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(tuple(sizes), devices=devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(array), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over every device."""
    return NamedSharding(mesh, P(AXES))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where the global batch does not divide over the mesh."""
    if batch_size < 1 or batch_size % mesh.size:
        below, above = batch_size // mesh.size * mesh.size, -(-batch_size // mesh.size) * mesh.size
        near = " or ".join(str(n) for n in (below, above) if n > 0) or str(mesh.size)
        raise UserError(
            f"batch_size {batch_size} does not divide over {mesh.size} devices "
            f"({', '.join(f'{a}={n}' for a, n in mesh.shape.items())}); set --config.batch_size={near}"
        )


def paths(tree: PyTree) -> dict[str, Any]:
    """Leaves of a nested dict by their slash-separated paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def parameter_specs(shapes: PyTree, rules: Rules) -> PyTree[P]:
    """PartitionSpecs in the tree of `shapes` (arrays or ShapeDtypeStructs).

    Raises:
      ValueError: a parameter that no rule matches, or a rule that matches no parameter: table and model have drifted apart.
    """
    used: set[int] = set()

    def spec(path: tuple[Any, ...], leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for number, (pattern, rule) in enumerate(rules):
            if re.fullmatch(pattern, name):
                used.add(number)
                if len(rule) > len(leaf.shape):
                    raise ValueError(
                        f"sharding rule {pattern!r} has {len(rule)} dimensions, {name} has {len(leaf.shape)}"
                    )
                return rule
        raise ValueError(
            f"no sharding rule matches parameter {name} {tuple(leaf.shape)}; add a row to the objective's table"
        )

    specs = jax.tree_util.tree_map_with_path(spec, shapes)
    unused = [pattern for number, (pattern, _) in enumerate(rules) if number not in used]
    if unused:
        raise ValueError(f"sharding rules that match no parameter: {unused}; remove them from the objective's table")
    return specs


def parameter_shardings(shapes: PyTree, mesh: Mesh, rules: Rules) -> PyTree[NamedSharding]:
    """NamedShardings in the tree of `shapes`.

    Raises:
      UserError: a dimension does not divide over its mesh axis.
      ValueError: as `parameter_specs`.
    """

    def check(path: tuple[Any, ...], leaf: jax.Array | jax.ShapeDtypeStruct, spec: P) -> NamedSharding:
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"{name} has a dimension of {size}, which does not divide over {axis}={mesh.shape[axis]}; choose --config.mesh.{axis} so that it divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(check, shapes, parameter_specs(shapes, rules))


def with_explicit_gradient_allreduce(
    value_and_grad: Callable[..., tuple[PyTree, PyTree]], specs: PyTree[P], mesh: Mesh, dtype: DTypeLike
) -> Callable[..., tuple[PyTree, PyTree]]:
    """`value_and_grad` with explicit all-reduces over `replica` and `data`: one per stacked weight, for all of its layers.

    Left alone, the compiler all-reduces each weight of each layer separately once its fsdp shard is known. Between TPU slices
    that is a reduce-scatter over `data`, an all-reduce over the data-centre network and an all-gather over `data`, and the
    latency of many small ones adds up.

    Args:
      value_and_grad: (params, *examples) -> (values, gradients); values and gradients are means over examples.
      specs: PartitionSpecs in the tree of params (`parameter_specs`); at least one parameter is split over fsdp and at least
        one is not.
      mesh: the mesh of `specs`.
      dtype: type in which gradients of split parameters are communicated; those of the rest are float32.

    Returns:
      A function of the same arguments, for jax.jit. Every array of examples has the batch first, which divides over the mesh
      (`check_batch`).
    """
    axes = ("replica", "data")
    groups = mesh.shape["replica"] * mesh.shape["data"]
    # Whole tiles for each device, or the compiler cannot scatter the sum.
    unit = 1024 * mesh.shape["data"]

    def mean_of_shard(x: jax.Array) -> jax.Array:
        """Mean over the groups of one device's shard."""
        flat = jnp.pad(x.reshape(-1), (0, -x.size % unit))
        return (jax.lax.psum(flat, axes)[: x.size].astype(jnp.float32) / groups).reshape(x.shape)

    def mean_of_replicated(x: jax.Array) -> jax.Array:
        """Mean over the groups of what every fsdp device holds whole: each device sends a part of it."""
        parts = jnp.pad(x, (0, -x.size % (unit * mesh.shape["fsdp"]))).reshape(mesh.shape["fsdp"], -1)
        part = mean_of_shard(parts[jax.lax.axis_index("fsdp")])
        return jax.lax.all_gather(part, "fsdp", tiled=True)[: x.size]

    def in_group(params: PyTree, *examples: jax.Array) -> tuple[PyTree, PyTree]:
        """Values and gradients of one group's examples, which are split over fsdp as the parameters are."""
        examples = tuple(jax.lax.with_sharding_constraint(x, P("fsdp")) for x in examples)
        values, gradients = value_and_grad(params, *examples)
        leaves, tree = jax.tree.flatten(gradients)
        leaf_specs = tree.flatten_up_to(specs)
        split = [n for n, spec in enumerate(leaf_specs) if any(spec)]
        whole = [n for n, spec in enumerate(leaf_specs) if not any(spec)]
        small = jnp.concatenate([leaves[n].astype(jnp.float32).reshape(-1) for n in whole])
        part_specs = (*(leaf_specs[n] for n in split), P())
        *large, small = jax.shard_map(
            lambda *parts: (*map(mean_of_shard, parts[:-1]), mean_of_replicated(parts[-1])),
            in_specs=part_specs, out_specs=part_specs, axis_names={"fsdp"}, check_vma=False,
        )(*(leaves[n].astype(dtype) for n in split), small)  # fmt: skip
        ends = np.cumsum([leaves[n].size for n in whole])
        for n, leaf in zip((*split, *whole), (*large, *jnp.split(small, ends[:-1])), strict=True):
            leaves[n] = leaf.reshape(leaves[n].shape)
        return jax.tree.map(lambda x: jax.lax.pmean(x, axes), values), jax.tree.unflatten(tree, leaves)

    def explicit(params: PyTree, *examples: jax.Array) -> tuple[PyTree, PyTree]:
        in_specs = (P(), *[P(axes)] * len(examples))
        return jax.shard_map(
            in_group, mesh=mesh, in_specs=in_specs, out_specs=P(), axis_names=set(axes), check_vma=False
        )(params, *examples)

    return explicit


def optimizer_shardings(
    optimizer: optax.GradientTransformation, shapes: PyTree, shardings: PyTree[NamedSharding], mesh: Mesh
) -> PyTree[NamedSharding]:
    """Shardings of `optimizer.init(params)`: moments like their parameters, everything else replicated.

    Without these, `jit(optimizer.init)` silently replicates the moments on every device.
    """
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
