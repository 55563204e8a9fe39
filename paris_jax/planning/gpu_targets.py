"""Descriptions of NVIDIA GPUs to compile for without one, in the text form of XLA's GpuTargetConfig."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Numbers of NVIDIA's data sheets that XLA compiles with."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes/s
    l2_cache: int  # bytes
    shared_memory: int  # bytes of each core


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 151_397_597_184, 4_800_000_000_000, 50 << 20, 228 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 84_942_979_072, 3_352_000_000_000, 50 << 20, 228 << 10),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 84_974_239_744, 2_039_000_000_000, 40 << 20, 164 << 10),
}
GPUS_PER_HOST = 8

TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin}
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  name: "{gpu.name}"
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} {features} }}
  runtime_version: "12.9.0"
  driver_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def target_config(name: str) -> str:
    """The target config of a GPU of `GPUS`."""
    gpu = GPUS[name]
    hopper = gpu.capability >= (9, 0)
    return TARGET.format(
        gpu=gpu,
        optin=gpu.shared_memory - 1024,  # of each core's memory, 1 KiB is the system's
        fpus=128 if hopper else 64,
        features="feature_extension: ACCELERATED_FEATURES" if hopper else "",
    )
