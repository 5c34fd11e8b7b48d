"""Eight forced CPU devices, and every jaxtyping annotation checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402
import pytest
from jaxtyping import install_import_hook

install_import_hook("d1jax", "beartype.beartype")
