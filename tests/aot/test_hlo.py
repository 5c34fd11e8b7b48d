import jax
import jax.numpy as jnp
import pytest

from d1jax.aot import hlo
from d1jax.aot.hlo import Shape
from tests.aot import programs

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused (p0: f32[4,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %row = f32[1,8]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%fused
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %x)
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(BOUND)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%start)
  %near = f32[4,8]{1,0:T(8,128)S(1)} copy(%x.1), metadata={op_name="jit(f)/copy (near)"}
  %init = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%copied, %x.1)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  ROOT %last = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
  ("dtype", "dims", "expected"),
  [("bf16", (3, 5), 30), ("f32", (), 4), ("pred", (7,), 7), ("s4", (5,), 3), ("f8e4m3fn", (6,), 6), ("c64", (2,), 16)],
)
def test_bytes_of_an_array(dtype, dims, expected):
  assert Shape(dtype, dims, False).bytes == expected


def test_a_program_is_read():
  program = hlo.parse(TEXT.replace("BOUND", "6"))
  main = program.computations["main"]
  assert program.entry == "main"
  assert main["near"].shapes == (Shape("f32", (4, 8), True),)
  assert main["loop"].shapes == (Shape("s32", (), False), Shape("f32", (4, 8), False))
  assert main["loop"].called("body") == ("body",)
  assert program.computations["body"]["row"].operands == ("x", "i")


@pytest.mark.parametrize(("bound", "trips"), [(6, 3), (7, 3), (8, 4), (1, 0)])
def test_the_length_of_a_loop_follows_from_its_counter(bound, trips):
  program = hlo.parse(TEXT.replace("BOUND", str(bound)))
  assert hlo.trip_count(program, "main", program.computations["main"]["loop"]) == trips
  assert program.open_loops() == 0


@pytest.mark.parametrize("sides", ["%less, %more", "%more, %less"])
def test_a_loop_that_data_may_end_earlier_counts_as_often_as_it_may_run(sides):
  text = TEXT.replace("ROOT %less", "%less").replace(
    "direction=LT\n", f"direction=LT\n  %more = pred[] custom-call(%state.1)\n  ROOT %on = pred[] and({sides})\n"
  )
  program = hlo.parse(text.replace("BOUND", "8"))
  assert [run.times for run in program.runs() if run.instruction.name == "row"] == [4]
  assert program.open_loops() == 0


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("direction=LT", "direction=NE"),
    ("%copied = s32[]{:T(128)} copy(%start)", "%copied = s32[]{:T(128)} convert(%x.1)"),
    ("%next = s32[]{:T(128)} add(%i, %two)", "%next = s32[]{:T(128)} multiply(%i, %two)"),
    ("compare(%i.1, %bound)", "compare(%bound, %i.1)"),
  ],
)
def test_a_loop_that_ends_otherwise_is_open(old, new):
  program = hlo.parse(TEXT.replace("BOUND", "6").replace(old, new))
  assert program.open_loops() == 1
  assert [run.times for run in program.runs() if run.instruction.name == "row"] == [1]


def test_what_the_compiler_wrote_down_wins():
  annotated = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
  program = hlo.parse(annotated.replace("BOUND", "6"))
  assert [run.times for run in program.runs() if run.instruction.name == "row"] == [9]


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation in a program of 5 characters"):
    hlo.parse("hello")


def runs_of(program, opcode):
  return sorted(run.times for run in program.runs() if run.instruction.opcode.removesuffix("-start") == opcode)


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_loops_multiply(platform):
  def function(x):
    inner = lambda x, _: (jnp.sin(jax.lax.psum(x, "b")), None)
    outer = lambda i, x: jax.lax.psum(jax.lax.scan(inner, x, length=5)[0], "a") + i
    return jax.lax.psum(jax.lax.fori_loop(0, 3, outer, x), ("a", "b"))

  program = hlo.parse(programs.compiled(platform, function, (64, 128)).as_text())
  assert program.open_loops() == 0
  assert runs_of(program, "all-reduce") == [1, 3, 15]


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_a_loop_that_data_ends_is_open(platform):
  def function(x):
    return jax.lax.while_loop(lambda x: jnp.max(jax.lax.pmax(x, ("a", "b"))) > 1, lambda x: jnp.sin(x) * 0.9, x)

  assert hlo.parse(programs.compiled(platform, function, (64, 128)).as_text()).open_loops() == 1


@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_a_branch_counts_its_share(platform):
  def function(x):
    branches = [lambda x: jax.lax.psum(x, "a"), lambda x: jax.lax.psum(jnp.sin(x), "b"), lambda x: jnp.cos(x)]
    step = lambda i, x: jnp.tanh(jax.lax.switch(i % 3, branches, x))
    return jax.lax.fori_loop(0, 6, step, x)

  program = hlo.parse(programs.compiled(platform, function, (64, 128)).as_text())
  assert runs_of(program, "all-reduce") == [2, 2]
