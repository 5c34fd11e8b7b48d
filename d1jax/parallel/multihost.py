"""What a process does about devices before anything else runs."""

import os

import jax


def split_cpu(devices: int) -> None:
  """Splits the CPU into several devices, so that a batch is shared between cores; call it before the first array is
  made.

  Programs of small models hardly use a second core within an operation. Accelerators are not affected, and a number set
  by `--xla_force_host_platform_device_count` in `XLA_FLAGS` stands.
  """
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", devices)
