"""Programs that occupy their device for a given time, and leave the cores of this machine alone, as accelerators do.

A host callback would not do: JAX waits for a program with one before it dispatches the next. So the wait is a function
in C that XLA calls, compiled with the C compiler of this machine.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

SOURCE = """
#include <stddef.h>
#include <time.h>
#include "xla/ffi/api/c_api.h"

XLA_FFI_Error* occupy(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != NULL && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* said = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
    said->api_version.major_version = XLA_FFI_API_MAJOR;
    said->api_version.minor_version = XLA_FFI_API_MINOR;
    return NULL;
  }
  double seconds = *(float*)((XLA_FFI_Buffer*)frame->args.args[0])->data;
  struct timespec time = {(time_t)seconds, (long)(1e9 * (seconds - (time_t)seconds))};
  nanosleep(&time, NULL);
  *(int*)((XLA_FFI_Buffer*)frame->rets.rets[0])->data = 0;
  return NULL;
}
"""


@functools.cache
def _register() -> None:
  """Compiles the wait, and makes it known to XLA."""
  with tempfile.TemporaryDirectory() as folder:
    source, library = Path(folder) / "occupy.c", Path(folder) / "occupy.so"
    source.write_text(SOURCE, encoding="ascii")
    include = ("-I", jax.ffi.include_dir())
    subprocess.run(["cc", "-shared", "-fPIC", *include, "-o", str(library), str(source)], check=True)
    function = ctypes.CDLL(str(library)).occupy
  jax.ffi.register_ffi_target("occupy", jax.ffi.pycapsule(function), platform="cpu")


def for_seconds(encode: Callable[..., Any], seconds: float) -> Callable[..., Any]:
  """The `encode` of a denoiser, each forward pass of which occupies its device for so many seconds more."""
  _register()
  wait = jax.ffi.ffi_call("occupy", jax.ShapeDtypeStruct((), jnp.int32))

  def slower(params: Any, tokens: jax.Array, *rest: Any, **named: Any) -> Any:
    # The wait depends on the tokens, and the tokens on the wait: nothing moves it, leaves it out, or shares it.
    begun = jnp.where(tokens[0, 0] < 0, 0.0, seconds).astype(jnp.float32)
    return encode(params, tokens + wait(begun), *rest, **named)

  return slower
