"""XLA compiler options by chip, each with its reason. `config.compiler_options` changes or removes them for a run."""

from collections.abc import Mapping

# v5e: the only chip that runs a reduce-scatter inside a matmul fusion; the compiler refuses these options for other chips.
# Without them every gradient reduce-scatter blocks (docs/performance.md).
_V5E = {
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    # Each gradient on its own: a combined reduce-scatter of many layers cannot start before the last of them is computed.
    "xla_tpu_ars_combiner_threshold_in_bytes": "0",
    # VMEM of a fusion in KiB: fusions with a collective in them need more than the default of 16 MiB. With 24 MiB some matmuls
    # of B/16 at 512 px with 64 images per chip do not fit and take 0.6 s each; with 16 images per chip the step is 2 % faster
    # (docs/performance.md).
    "xla_tpu_scoped_vmem_limit_kib": "32768",
}
# Chips with SparseCores, which run collectives next to the matmuls. Without these options all-gathers block as well.
_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_scoped_vmem_limit_kib": "24576",
}
# By jax.Device.device_kind; other TPUs run with the compiler's defaults.
TPU_OPTIONS = {"TPU v5 lite": _V5E, "TPU v5": _SPARSE_CORE, "TPU v6 lite": _SPARSE_CORE}
# Several TPU slices (sharding.with_explicit_gradient_allreduce): without this the compiler computes matmuls piece by piece while
# their weights arrive, which takes longer than waiting for the weights.
_SEVERAL_SLICES = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_NVIDIA = {
    # Where XLA may skip a rounding to bfloat16 it keeps the float32 values in memory instead.
    "xla_allow_excess_precision": "False",
    # cuBLAS adds the bias and computes the GELU while it writes a matmul's result; Triton's matmuls do not.
    "xla_gpu_enable_triton_gemm": "False",
}


def compiler_options(
    device_kind: str, replicas: int, overrides: Mapping[str, str | int | float | bool | None] | None = None
) -> dict[str, str]:
    """Options for programs of one kind of chip.

    Args:
      device_kind: jax.Device.device_kind.
      replicas: number of TPU slices.
      overrides: `config.compiler_options`: option name -> value; None removes an option.
    """
    if device_kind.startswith("NVIDIA"):
        options = dict(_NVIDIA)
    else:
        options = dict(TPU_OPTIONS.get(device_kind, {}))
        if replicas > 1 and device_kind.startswith("TPU"):
            options |= _SEVERAL_SLICES
    tpu = device_kind.startswith("TPU")
    for name, value in (overrides or {}).items():
        options.pop(name, None)
        if value is not None:  # libtpu reads "true", the other backends "True"
            options[name] = str(value).lower() if tpu and isinstance(value, bool) else str(value)
    return options
