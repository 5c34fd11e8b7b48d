import jax
import jax.numpy as jnp
import pytest

from d1jax.aot import hlo
from d1jax.aot.traffic import traffic
from tests.aot.test_hlo import TEXT

BIG, ROW = 4 * 8 * 128 * 4, 8 * 128 * 4
"""Bytes of float32 [4, 8, 128], and of one of its four rows."""

HEAD = """HloModule jit_f, is_scheduled=true

%take (p0: f32[4,8,128], p1: s32[]) -> f32[1,8,128] {
  %p0 = f32[4,8,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %sine = f32[1,8,128]{2,1,0} sine(%row)
}

%put (q0: f32[4,8,128], q1: f32[1,8,128], q2: s32[]) -> f32[4,8,128] {
  %q0 = f32[4,8,128]{2,1,0} parameter(0)
  %q1 = f32[1,8,128]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[4,8,128]{2,1,0} dynamic-update-slice(%q0, %q1, %q2, %zero.1, %zero.1)
}

%both (r0: f32[4,8,128]) -> (f32[4,8,128], f32[4,8,128]) {
  %r0 = f32[4,8,128]{2,1,0} parameter(0)
  %cosine = f32[4,8,128]{2,1,0} cosine(%r0)
  ROOT %pair = (f32[4,8,128]{2,1,0}, f32[4,8,128]{2,1,0}) tuple(%cosine, %r0)
}

%nested (n0: f32[4,8,128], n1: s32[]) -> f32[1,8,128] {
  %n0 = f32[4,8,128]{2,1,0} parameter(0)
  %view = f32[4,8,128]{2,1,0} bitcast(%n0)
  %n1 = s32[] parameter(1)
  ROOT %inner = f32[1,8,128]{2,1,0} fusion(%view, %n1), kind=kLoop, calls=%take
}

ENTRY %main (x: f32[4,8,128], i: s32[]) -> f32[4,8,128] {
  %x = f32[4,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[1,8,128]{2,1,0} fusion(%x, %i), kind=kLoop, calls=%take
"""


@pytest.mark.parametrize(
  ("lines", "expected"),
  [
    ([], 0),
    (["%y = f32[4,8,128]{2,1,0} sine(%x)"], 2 * BIG),
    (["%y = f32[4,8,128]{2,1,0:T(8,128)S(1)} sine(%x)"], BIG),
    (["%y = f32[4,8,128]{2,1,0} fusion(%x, %r, %i), kind=kLoop, calls=%put"], 2 * ROW + 4),
    (["%y = f32[4,8,128]{2,1,0} dynamic-update-slice(%x, %r, %i, %i, %i)"], 2 * ROW),
    (["%y = f32[1,8,128]{2,1,0} dynamic-slice(%x, %i, %i, %i), dynamic_slice_sizes={1,8,128}"], 2 * ROW),
    (["%y = f32[1,8,128]{2,1,0} fusion(%x, %i), kind=kLoop, calls=%nested"], 2 * ROW + 4),
    (["%y = (f32[4,8,128]{2,1,0}, f32[4,8,128]{2,1,0}) fusion(%x), kind=kLoop, calls=%both"], 2 * BIG),
    (
      [
        "%y = (f32[4,8,128]{2,1,0:S(1)}, f32[4,8,128]{2,1,0}, u32[]{:S(2)}) copy-start(%x)",
        "%z = f32[4,8,128]{2,1,0:S(1)} copy-done(%y)",
      ],
      BIG,
    ),
    (
      [
        "%y = ((f32[4,8,128]{2,1,0}), f32[1,8,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1]}",
        "%z = f32[1,8,128]{2,1,0:S(1)} slice-done(%y)",
      ],
      ROW,
    ),
    (
      [
        "%y = (f32[4,8,128]{2,1,0}, f32[8,8,128]{2,1,0}) all-gather-start(%x), dimensions={0}",
        "%z = f32[8,8,128]{2,1,0} all-gather-done(%y)",
      ],
      3 * BIG,
    ),
  ],
)
def test_bytes_of_each_kind_of_line(lines, expected):
  text = HEAD + "".join(f"  {line}\n" for line in lines) + "}\n"
  assert traffic(hlo.parse(text)) == expected + 2 * ROW + 4, "the row that is always taken, and its number"


def test_a_product_reads_both_sides_and_writes_one():
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 256))]
  compiled = jax.jit(jnp.matmul).lower(*shapes).compile()
  assert traffic(hlo.parse(compiled.as_text())) == 4 * (64 * 128 + 128 * 256 + 64 * 256)


def test_a_loop_multiplies():
  in_loop = (4 + 4 + 4) + (32 + 4 + 32)  # the counter; a row of 8 numbers
  outside = (4 + 4) + 128  # the counter's copy; 4 rows that are copied into the core's memory
  assert traffic(hlo.parse(TEXT.replace("BOUND", "6"))) == 3 * in_loop + outside
