#!/usr/bin/env bash
# Sets the XLA flags for a kind of device; source it before JAX starts:
#
#   source launch/device_flags.sh gpu|tpu
#
# Variables that are already set keep their values.

case ${1:-} in
  gpu)
    # Overlap collectives with computation, and allow JAX 92 % of the memory (default: three quarters).
    export XLA_FLAGS=${XLA_FLAGS---xla_gpu_enable_latency_hiding_scheduler=true}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION-0.92}
    ;;
  tpu)
    # Fuse and overlap the gathers of parameters and sums of gradients (fsdp, data) with the matrix products.
    paris_tpu_flags=(
      --xla_tpu_enable_async_collective_fusion=true
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
      --xla_tpu_enable_async_collective_fusion_multiple_steps=true
      --xla_tpu_overlap_compute_collective_tc=true
      --xla_enable_async_all_gather=true
      --xla_tpu_enable_data_parallel_all_reduce_opt=true
      --xla_tpu_data_parallel_opt_different_sized_ops=true
    )
    export LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS-${paris_tpu_flags[*]}}
    unset paris_tpu_flags
    ;;
  *)
    echo "launch/device_flags.sh: the first argument must be gpu or tpu" >&2
    return 1
    ;;
esac
