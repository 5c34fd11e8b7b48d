from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from d1jax.models import quantize
from d1jax.models.layers import project
from d1jax.models.quantize import NF4, Quantized
from tests.jaxprs import shapes

quantize_ = jax.jit(quantize.quantize, static_argnums=1)
dequantize_ = jax.jit(quantize.dequantize, static_argnums=1)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hard_matrix():
  """[192, 5] with an all-zero block, blocks whose largest magnitude is negative, and outliers."""
  w = normal(192, 5)
  w[64:128, 1] = 0
  w[10, 2] = -7.5
  w[150, 3] = 40.0
  w[0:64, 4] = -np.abs(w[0:64, 4])
  return w


def scale_of(block):
  """The largest magnitude, rounded to bfloat16."""
  return np.float32(np.abs(block).max().astype(ml_dtypes.bfloat16))


def blocks_of(w):
  """(block, column, 64 weights) of a matrix [in, out]."""
  for block in range(w.shape[0] // 64):
    for column in range(w.shape[1]):
      yield block, column, w[64 * block : 64 * block + 64, column]


def naive_nf4_code(value, scale):
  """The nearest table value, the lower of two that are equally near."""
  if scale == 0:
    return int(np.argmin(np.abs(NF4)))
  distance = np.abs(NF4.astype(np.float64) - np.float64(np.float32(value / scale)))
  return int(np.argmin(distance))


def unpacked(codes):
  """The 64 four-bit codes of each block: low halves of the bytes, then high halves."""
  codes = np.asarray(codes)
  return np.concatenate([codes & 15, codes >> 4], axis=-2)


def test_the_table_is_normal_float_4():
  assert len(NF4) == 16
  assert (np.diff(NF4) > 0).all()
  assert (NF4[0], NF4[7], NF4[15]) == (-1, 0, 1)
  # QLoRA, appendix E: the means of 9 quantiles on the positive side, 8 on the negative one, of a standard normal.
  inverse, offset = NormalDist().inv_cdf, 0.9677083
  positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  expected = np.sort([*negative, 0.0, *positive])
  np.testing.assert_allclose(NF4, expected / expected.max(), atol=2e-6)


def test_nf4_codes_are_the_nearest_table_values():
  w = hard_matrix()
  q = quantize_(jnp.asarray(w), "nf4")
  codes, scale = unpacked(q.codes), np.asarray(q.scale, np.float32)
  for block, column, values in blocks_of(w):
    expected = scale_of(values)
    assert scale[block, 0, column] == expected
    assert codes[block, :, column].tolist() == [naive_nf4_code(v, expected) for v in values]


def test_int8_codes_are_rounded_multiples():
  w = hard_matrix()
  q = quantize_(jnp.asarray(w), "int8")
  codes, scale = np.asarray(q.codes), np.asarray(q.scale, np.float32)
  for block, column, values in blocks_of(w):
    expected = scale_of(values)
    assert scale[block, 0, column] == expected
    unit = values / expected if expected > 0 else values
    assert codes[block, :, column].tolist() == np.clip(np.round(unit * np.float32(127)), -127, 127).tolist()


def test_ties_go_to_the_lower_table_value():
  """Weights half-way between two values; the scale is one, so that nothing is rounded before the comparison."""
  midpoints = (NF4[1:] + NF4[:-1]) / 2
  w = np.zeros((64, 1), np.float32)
  w[0], w[1:16, 0] = 1.0, midpoints
  w[16:31, 0], w[31:46, 0] = np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))
  codes = unpacked(quantize_(jnp.asarray(w), "nf4").codes)[0, :, 0]
  assert codes[0] == 15
  assert codes[1:16].tolist() == list(range(15))
  assert codes[16:31].tolist() == list(range(1, 16))
  assert codes[31:46].tolist() == list(range(15))


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_block_of_zeros_stays_zero(kind):
  w = hard_matrix()
  back = np.asarray(dequantize_(quantize_(jnp.asarray(w), kind)))
  np.testing.assert_array_equal(back[64:128, 1], 0)
  assert np.isfinite(back).all()


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_the_largest_weight_of_a_block_keeps_its_sign_and_size(kind):
  w = hard_matrix()
  back = np.asarray(dequantize_(quantize_(jnp.asarray(w), kind)))
  for block, column, values in blocks_of(w):
    top = int(np.abs(values).argmax())
    expected = np.sign(values[top]) * scale_of(values)
    assert back[64 * block + top, column] == pytest.approx(expected, rel=2e-7 if kind == "nf4" else 1 / 127)


def test_nf4_packs_row_r_and_row_r_plus_32_in_a_byte():
  w = np.zeros((128, 3), np.float32)
  w[0], w[5], w[64 + 40], w[64] = 1.0, -1.0, -1.0, 1.0
  codes = np.asarray(quantize_(jnp.asarray(w), "nf4").codes)
  zero, low, high = 7, 0, 15
  assert codes[0, 0].tolist() == [high | zero << 4] * 3
  assert codes[0, 5].tolist() == [low | zero << 4] * 3
  assert codes[1, 8].tolist() == [zero | low << 4] * 3
  assert codes[1, 9].tolist() == [zero | zero << 4] * 3


def test_shapes_types_and_bytes():
  w = jnp.asarray(normal(2, 256, 48))
  int8, nf4 = (quantize_(w, kind) for kind in ("int8", "nf4"))
  assert (int8.codes.shape, int8.codes.dtype) == ((2, 4, 64, 48), jnp.int8)
  assert (nf4.codes.shape, nf4.codes.dtype) == ((2, 4, 32, 48), jnp.uint8)
  for q, bits in ((int8, 8.25), (nf4, 4.25)):
    assert (q.scale.shape, q.scale.dtype) == ((2, 4, 1, 48), jnp.bfloat16)
    assert 8 * (q.codes.nbytes + q.scale.nbytes) == bits * w.size
    back = dequantize_(q)
    assert (back.shape, back.dtype) == (w.shape, jnp.float32)
    assert dequantize_(q, jnp.bfloat16).dtype == jnp.bfloat16


def test_int8_errs_by_half_a_step():
  """And by what rounding the scale to bfloat16 takes from the largest weights of a block (2^-9 of it)."""
  w = hard_matrix()
  error = np.abs(np.asarray(dequantize_(quantize_(jnp.asarray(w), "int8"))) - w)
  for block, column, values in blocks_of(w):
    scale = scale_of(values)
    step, top = scale / 127, np.abs(values).max()
    found = error[64 * block : 64 * block + 64, column]
    assert (found <= 0.5 * step * 1.0001 + max(top - scale, 0) * 1.0001).all()
    assert max(top - scale, 0) <= 2**-8 * top


def test_nf4_errs_by_half_the_widest_gap_at_most_and_by_what_qlora_says():
  w = normal(4096, 16)
  q = quantize_(jnp.asarray(w), "nf4")
  error = np.abs(np.asarray(dequantize_(q)) - w).reshape(64, 64, 16)
  scale = np.asarray(q.scale, np.float32)
  assert (error <= np.diff(NF4).max() / 2 * scale + 2**-8 * scale).all()
  assert 0.068 < error.mean() < 0.078  # blocks of 64 of a standard normal: bitsandbytes has 0.0728


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_bfloat16_weights_are_quantised_as_their_float32_values(kind):
  w = jnp.asarray(normal(128, 4), jnp.bfloat16)
  ours, same = quantize_(w, kind), quantize_(w.astype(jnp.float32), kind)
  jax.tree.map(np.testing.assert_array_equal, ours, same)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_shards_and_layers_are_quantised_as_the_whole(kind):
  w = jnp.asarray(normal(3, 256, 8))
  whole = quantize_(w, kind)
  for layer in range(3):
    one = quantize_(w[layer], kind)
    np.testing.assert_array_equal(one.codes, whole.codes[layer])
    np.testing.assert_array_equal(one.scale, whole.scale[layer])
    np.testing.assert_array_equal(dequantize_(one), dequantize_(whole)[layer])
  for rows in (0, 128):  # an input axis in two, an output axis in two
    for columns in (0, 4):
      part = quantize_(w[:, rows : rows + 128, columns : columns + 4], kind)
      blocks, outs = slice(rows // 64, rows // 64 + 2), slice(columns, columns + 4)
      np.testing.assert_array_equal(part.codes, whole.codes[:, blocks, :, outs])
      np.testing.assert_array_equal(part.scale, whole.scale[:, blocks, :, outs])


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_with_the_dequantised_matrix(kind, dtype):
  q = quantize_(jnp.asarray(normal(128, 6)), kind)
  x = jnp.asarray(normal(2, 3, 128, seed=1), dtype)
  y = jax.jit(project, static_argnums=2)(q, x, dtype)
  assert y.dtype == dtype
  expected = jax.jit(lambda q, x: x @ quantize.dequantize(q, dtype))(q, x)
  np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))
  plain = np.asarray(x, np.float64) @ np.asarray(dequantize_(q), np.float64)
  np.testing.assert_allclose(np.asarray(y, np.float64), plain, atol=1e-4 if dtype == jnp.float32 else 0.3)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("kind", quantize.KINDS)
def test_the_gradient_flows_to_the_activations(kind):
  q = quantize_(jnp.asarray(normal(64, 6)), kind)
  x, cotangent = jnp.asarray(normal(1, 2, 64, seed=1)), jnp.asarray(normal(1, 2, 6, seed=2))
  gradient = jax.grad(lambda x: jnp.sum(project(q, x, jnp.float32) * cotangent))(x)
  expected = np.asarray(cotangent, np.float64) @ np.asarray(dequantize_(q), np.float64).T
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


LAYERS, WIDTH = 7, 64


def run_layers(stack, x):
  """A scan over the stack, recomputed in the backward pass, as the transformer does it."""

  def body(x, w):
    return jnp.tanh(project(w, x, jnp.float32)), None

  return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, stack)[0]


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_scan_dequantises_a_layer_at_a_time(kind):
  stack = quantize_(jnp.asarray(normal(LAYERS, WIDTH, WIDTH) / 8), kind)
  x = jnp.asarray(normal(1, 2, WIDTH, seed=1))
  gradient = jax.grad(lambda x, stack: jnp.sum(run_layers(stack, x) ** 2))
  y = x
  for layer in range(LAYERS):
    y = jnp.tanh(y @ dequantize_(jax.tree.map(lambda part, i=layer: part[i], stack)))
  np.testing.assert_allclose(run_layers(stack, x), y, rtol=1e-5, atol=1e-6)

  dense, stored = LAYERS * WIDTH * WIDTH, stack.codes.size
  for function in (lambda x, stack: run_layers(stack, x), gradient):
    floats = [shape for shape in shapes(function, x, stack) if np.prod(shape) >= min(dense, stored)]
    assert not floats, f"arrays as large as the stack: {floats}"
    # The compiler may move a computation out of the loop, where it does not depend on the loop.
    text = jax.jit(function).lower(x, stack).compile().as_text()
    for kind_of_float in ("f32", "bf16"):
      assert f"{kind_of_float}[{LAYERS},{WIDTH},{WIDTH}]" not in text
      assert f"{kind_of_float}[{LAYERS},1,{WIDTH},{WIDTH}]" not in text
  dense_shapes = shapes(lambda x, stack: run_layers(quantize.dequantize(stack), x), x, stack)
  assert (LAYERS, WIDTH, WIDTH) in dense_shapes, "the check would not see a dense stack"


def test_axes_have_one_name_more():
  axes = quantize.axes(("layers", "embed", "heads"))
  assert axes == Quantized(("layers", "embed", None, "heads"), ("layers", "embed", None, "heads"))


@pytest.mark.parametrize("kind", ["int4", "", "NF4"])
def test_an_unknown_kind_is_named(kind):
  with pytest.raises(ValueError, match=rf"quantize='{kind}' is unknown; known: int8, nf4"):
    quantize.quantize(jnp.zeros((64, 2)), kind)


@pytest.mark.parametrize("width", [32, 96])
def test_a_width_that_is_no_multiple_of_64_is_named(width):
  with pytest.raises(ValueError, match=rf"\(3, {width}, 128\).*no multiple of 64"):
    quantize.quantize(jnp.zeros((3, width, 128)), "nf4")
