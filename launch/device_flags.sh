#!/usr/bin/env bash
# What XLA is told on each kind of device, before JAX starts; sourced with the kind:
#
#   source launch/device_flags.sh gpu|tpu
#
# A variable that is set already stays as it is.

case ${1:-} in
  gpu)
    # Collectives run beside the computation, and all of the memory may be used (by default three quarters).
    export XLA_FLAGS=${XLA_FLAGS---xla_gpu_enable_latency_hiding_scheduler=true}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION-0.92}
    ;;
  tpu)
    # Gathers of parameters and sums of gradients (fsdp, data) are fused with, and run beside, the matrix products.
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
    echo "launch/device_flags.sh: the first word must be gpu or tpu" >&2
    return 1
    ;;
esac
