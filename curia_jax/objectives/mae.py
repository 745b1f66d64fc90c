"""Stage one as pure functions: the train state of a masked autoencoder, its shardings and its step.

`pretrain` runs this step and `plan` compiles it, so that what is planned is what runs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from curia_common.errors import UserError
from curia_jax import augment, data, optimizer, sharding
from curia_jax.models import mae, vit

State = dict[str, Any]

# For the TPU compiler, so that collectives run behind products (docs/performance.md). Without them every reduce-scatter of
# gradients stays in line, and on chips with SparseCores every all-gather too.
_IN_FUSIONS = {
    # Only a v5e runs a reduce-scatter inside the fusions of products; the compiler refuses it for other chips. Each gradient
    # has to stay by itself: one of many layers is not ready before the last of them. Fusions need more of the chip's own
    # memory than the 16 MiB that they get.
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    "xla_tpu_ars_combiner_threshold_in_bytes": "0",
    "xla_tpu_scoped_vmem_limit_kib": "24576",
}
_ON_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_scoped_vmem_limit_kib": "24576",
}
# By jax.Device.device_kind; other chips get no options.
TPU_OPTIONS = {"TPU v5 lite": _IN_FUSIONS, "TPU v5": _ON_SPARSE_CORES, "TPU v6 lite": _ON_SPARSE_CORES}
# Where sums are written out (sharding.with_sums_by_hand) the compiler would otherwise compute products piece by piece as their
# kernels arrive, which takes longer than to wait for them.
_BETWEEN_SLICES = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


# For NVIDIA GPUs. Where XLA may leave out a rounding to bfloat16 it keeps the float32 values in memory instead. Products are for
# cuBLAS, which adds the bias and computes the GELU as it writes them; Triton's do not.
_NVIDIA_OPTIONS = {"xla_allow_excess_precision": "False", "xla_gpu_enable_triton_gemm": "False"}


def compiler_options(device_kind: str, replicas: int) -> dict[str, str]:
    """What the compiler is told for chips of this kind in `replicas` TPU slices."""
    if device_kind.startswith("NVIDIA"):
        return _NVIDIA_OPTIONS
    options = TPU_OPTIONS.get(device_kind, {})
    return options | _BETWEEN_SLICES if replicas > 1 and device_kind.startswith("TPU") else options


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run of stage one is made of.

    Attributes:
      model: the masked autoencoder's configuration.
      init: key -> train state {"step", "params", "opt_state"}.
      step: (state, batch of augment.Batch) -> (state, metrics).
      abstract_state: shapes and dtypes of the state, each with its NamedSharding.
      abstract_batch: the same of a global batch.
      compiler_options: what the compiler of the mesh's devices is told.
    """

    model: mae.MAEConfig
    init: Callable[[jax.Array], State]
    step: Callable[[State, augment.Batch], tuple[State, dict[str, jax.Array]]]
    abstract_state: State
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    compiler_options: dict[str, str]

    def initial_state(self, seed: int) -> State:
        """The state of step 0, every array made on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(self.init, out_shardings=shardings)(jax.random.key(seed))

    def trace(self) -> Any:
        """The train step for the devices of the mesh, traced (jax.stages.Traced); its state argument is donated.

        Metrics are on every device, so that every host can read them.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        mesh = shardings["step"].mesh
        step = jax.jit(self.step, out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0)
        with jax.set_mesh(mesh):  # from it the model knows that parameters are split
            return step.trace(self.abstract_state, self.abstract_batch)

    def compile(self) -> Any:
        """The train step, compiled for the devices of the mesh."""
        return self.trace().lower().compile(compiler_options=self.compiler_options)


def make(
    config: ml_collections.ConfigDict, mesh: Mesh, *, canvas: tuple[int, int], warmup_steps: int, total_steps: int
) -> Objective:
    """Derives everything from the config and the mesh, shapes before arrays.

    Args:
      config: `model`, `augment`, `optimizer`, `batch_size` and `seed` of a run.
      canvas: height and width of the pixels in a batch.

    Raises:
      UserError: image and patch sizes, the batch or the mesh do not fit together.
    """
    sharding.check_batch(config.batch_size, mesh)
    try:
        model = mae.config(**config.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    transform, rate = optimizer.make(
        config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
    )
    patches = math.prod(n // p for n, p in zip(model.encoder.image_size, model.encoder.patch_size, strict=True))

    def init(key: jax.Array) -> State:
        params = mae.init(model, key)
        return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": transform.init(params)}

    def step(state: State, batch: augment.Batch) -> tuple[State, dict[str, jax.Array]]:
        # Everything random follows from the seed and the step alone.
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        view_key, mask_key = jax.random.split(key)
        with jax.named_scope("augment"):
            images = augment.training_view(batch, view_key, config.augment, model.encoder.image_size)
        noise = jax.random.uniform(mask_key, (images.shape[0], patches))

        def loss_of(params: Any, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = mae.bind(model, params)(images, noise)
            hidden = jnp.sum(output.mask)
            baseline = jnp.sum(jnp.mean(jnp.square(output.target), axis=-1) * output.mask) / hidden
            return output.loss, baseline

        value_and_gradients = jax.value_and_grad(loss_of, has_aux=True)
        if mesh.shape["replica"] > 1:
            dtype = vit.DTYPES[model.encoder.dtype]
            value_and_gradients = sharding.with_sums_by_hand(value_and_gradients, specs, mesh, dtype)
        (loss, baseline), gradients = value_and_gradients(state["params"], images, noise)
        with jax.named_scope("optimizer"):
            updates, opt_state = transform.update(gradients, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        metrics = {
            "loss": loss,
            "baseline_loss": baseline,
            "learning_rate": rate(state["step"]),
            "gradient_norm": optax.global_norm(gradients),
            "parameter_norm": optax.global_norm(params),
        }
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    shapes = jax.eval_shape(init, jax.random.key(0))
    specs = sharding.parameter_specs(shapes["params"])
    params = sharding.parameter_shardings(shapes["params"], mesh)
    shardings = {
        "step": NamedSharding(mesh, P()),
        "params": params,
        "opt_state": sharding.optimizer_shardings(transform, shapes["params"], params, mesh),
    }
    with_sharding = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
    split = sharding.batch_sharding(mesh)
    per_example = {"pixels": canvas, "extent": (2,)}
    abstract_batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *per_example.get(name, ())), dtype, sharding=split)
        for name, dtype in data.DEVICE_FIELDS.items()
    }
    options = compiler_options(mesh.devices.flat[0].device_kind, mesh.shape["replica"])
    return Objective(model, init, step, with_sharding, abstract_batch, options)
