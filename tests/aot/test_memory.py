import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d1jax.aot import hlo, memory
from d1jax.aot.memory import GIB, Buffer, Memory
from tests.aot import programs
from tests.aot.test_hlo import TEXT

LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.50G of \
15.75G hbm. Exceeded hbm capacity by 2.75G.

Total hbm usage >= 18.76G:
    reserved        264.00M
    program          18.50G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 12.00G
     Operator: op_name="jit(f)/while/body/dot_general" source_file="f.py" source_line=3
     Shape: f32[32,512,196608]{2,1,0:T(8,128)}
     Unpadded size: 12.00G
     XLA label: fusion.3 = fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[2,4096,32768]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
     Allocation type: HLO temp
"""
EARLY = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) exceeds"
  " available HBM (15.75G)."
)
LOWERED = """%0 = stablehlo.add %a, %b : tensor<4x8xf32> loc(#1)
%1 = f(%0) : (tensor<4x8xf32>) -> tensor<100xbf16>, tensor<1xindex>
"""


def test_the_compilers_list_is_read():
  found = memory.refusal(LISTED, LOWERED)
  assert (found.needed, found.available) == (round(18.5 * GIB), round(15.75 * GIB))
  assert found.largest == [
    Buffer(12 * GIB, "f32[32,512,196608]", "jit(f)/while/body/dot_general"),
    Buffer(GIB // 2, "bf16[2,4096,32768]", ""),
  ]


def test_without_a_list_the_lowered_program_is_read():
  found = memory.refusal(EARLY, LOWERED)
  assert (found.needed, found.available) == (40 * GIB, round(15.75 * GIB))
  assert [(buffer.bytes, buffer.shape) for buffer in found.largest] == [
    (200, "bf16[100]"),
    (128, "f32[4,8]"),
    (1, "index[1]"),
  ]


def test_other_failures_pass():
  with pytest.raises(ValueError, match="not about memory: INTERNAL: something"):
    memory.refusal("INTERNAL: something\nelse", LOWERED)


def test_a_real_refusal_is_read():
  def function(x):
    y = jnp.sort(x, axis=0)
    return jnp.sum(jnp.sort(y, axis=1) + jnp.flip(y, axis=0)), x.T

  placement = jax.sharding.SingleDeviceSharding(programs.devices("v5e:2x4")[0])
  lowered = jax.jit(function).lower(jax.ShapeDtypeStruct((2**21, 1024), jnp.float32, sharding=placement))
  with pytest.raises(jax.errors.JaxRuntimeError) as failure:
    lowered.compile()
  found = memory.refusal(str(failure.value), lowered.as_text())
  assert found.available == round(15.75 * GIB)
  assert found.needed > found.available
  assert found.largest[0] == Buffer(8 * GIB, "f32[1024,2097152]", "before it is divided")
  assert found.largest[1].shape == "f32[2097152,1024]"


def test_the_largest_buffers_of_a_program():
  text = TEXT.replace("BOUND", "6").replace(
    "%next =", "%wide = f32[4,64]{1,0} broadcast(%x), metadata={op_name=\"jit(f)/x[\\'a\\']\"}\n  %next ="
  )
  found = memory.largest(hlo.parse(text), Memory({"trained": 2000, "rest": 1}, 0, 0, 0, elsewhere=500))
  assert found[:3] == [
    Buffer(2000, "trained", "arguments"),
    Buffer(1024, "f32[4,64]", "jit(f)/x['a']"),
    Buffer(500, "elsewhere", "of the run, beside the program"),
  ]
  assert "f32[4,8]" not in [buffer.shape for buffer in found], "only in the core's memory, or an argument"


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_parts_sum_to_what_the_compiler_says(platform):
  compiled = programs.compiled(platform, lambda x: jnp.sin(jax.lax.all_gather(x, "a"))[0] + x, (64, 130))
  found = memory.memory(compiled, {"weights": 8 * 130 * 4}, elsewhere=1000)
  said = compiled.memory_analysis()
  whole = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
  assert found.program == whole + said.temp_size_in_bytes + said.generated_code_size_in_bytes
  assert found.total == found.program + 1000
  assert found.arguments["weights"] + found.arguments["rest"] == said.argument_size_in_bytes
  assert found.arguments["rest"] >= 0


def test_a_total_by_hand():
  found = Memory({"trained": 5, "rest": 2}, outputs=3, temporaries=20, code=1, elsewhere=100)
  assert (found.program, found.total) == (31, 131)


def test_bytes_of_a_device():
  mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
  cut = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  shapes = {"x": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16), "y": jax.ShapeDtypeStruct((3,), jnp.float32)}
  placements = {"x": cut("a", "b"), "y": cut()}
  placed = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placements[n]) for n, x in shapes.items()}
  assert memory.bytes_a_device(placed) == 2 * 3 * 2 + 3 * 4
  assert memory.bytes_placed(shapes, placements) == 2 * 3 * 2 + 3 * 4
  assert memory.bytes_placed(shapes, placements | {"x": None}) == 3 * 4


def test_nothing_of_the_compiler_is_left_out():
  """Four numbers of the compiler, three of ours: what takes the place of an argument is counted there."""
  said = types.SimpleNamespace(
    argument_size_in_bytes=100,
    output_size_in_bytes=60,
    alias_size_in_bytes=50,
    temp_size_in_bytes=7,
    generated_code_size_in_bytes=3,
  )
  found = memory.memory(types.SimpleNamespace(memory_analysis=lambda: said), {"trained": 40}, 0)
  assert found == Memory({"trained": 40, "rest": 60}, 10, 7, 3, 0)
