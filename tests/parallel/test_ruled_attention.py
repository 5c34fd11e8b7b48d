"""Attention under a rule of who sees whom, without an array of all pairs of positions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.models.layers import Visible, plain_attention
from d1jax.models.visibility import BlockCausal, TwoStreams
from d1jax.parallel import attention as kernels
from d1jax.parallel.mesh import RULES, sharding
from tests.parallel.test_attention import arrays, cudnn_calls, lowered_for_cuda, mesh_of, splash_calls

STREAMS = TwoStreams(5, 90, 45)


def ruled(t, s, rule, *, start=None, packed=False, **shape):
  """Queries, keys, values and the mask; the queries are the last ones, unless they start elsewhere."""
  q, k, v, visible = arrays(t, s, **shape)
  segment = jnp.asarray(np.arange(s)[None] // [[37], [s // 2]], jnp.int32) if packed else None
  return q, k, v, Visible(visible.valid, rule, s - t if start is None else start, segment)


def assert_agree(attention, inputs, traced=False):
  """Results and gradients of the queries that see a key are those of plain attention; the others are finite."""
  q, k, v, visible = inputs
  sees = np.asarray(visible.seen(q.shape[1]).any(-1))[:, 0, :, None, None]
  weights = np.random.default_rng(0).normal(size=q.shape) * sees
  outcomes = []
  for attend in (attention, plain_attention):

    def loss(q, k, v, start, attend=attend):
      out = attend(q, k, v, visible._replace(start=start if traced else visible.start))
      return jnp.sum(weights * out), out

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = gradient(q, k, v, visible.start)
    assert np.isfinite(out).all()
    outcomes.append((out * sees, *gradients))
  for found, expected in zip(*outcomes, strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


CASES = {
  "causal": dict(t=128, s=128, rule=BlockCausal(1), b=1, n=1, k=1),
  "blocks": dict(t=201, s=201, rule=BlockCausal(4), n=4, k=1),
  "streams": dict(t=135, s=135, rule=STREAMS),
  "packed streams": dict(t=135, s=135, rule=STREAMS, packed=True),
  "packed": dict(t=130, s=150, rule=None, packed=True),
  "window": dict(t=130, s=300, rule=BlockCausal(7), start=100),
  "traced window": dict(t=130, s=150, rule=BlockCausal(32), packed=True),
}


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", CASES)
def test_chunks_are_plain_attention(monkeypatch, name):
  monkeypatch.setattr(kernels, "CHUNK", 70)
  assert_agree(kernels.in_chunks, ruled(**CASES[name]), traced="traced" in name)


@pytest.mark.few(1, reason="the kernel is interpreted")
@pytest.mark.parametrize("name", CASES)
def test_splash_attention_is_plain_attention(interpreted, name):
  assert_agree(kernels.splash_attention, ruled(**CASES[name]), traced="traced" in name)
  assert interpreted


@pytest.mark.slow(reason="the kernel is interpreted, on tiles that it leaves out")
def test_splash_attention_leaves_out_tiles(interpreted):
  inputs = ruled(1160, 1160, TwoStreams(8, 640, 120), b=1, n=1, k=1, h=8)
  assert_agree(kernels.splash_attention, inputs)
  assert interpreted == [(1, 1536, 1536)]
  assert not kernels._mask(inputs[3], 1160, (1536, 1536))[:512, 1024:].any(), "clean queries see no noisy key"


@pytest.mark.slow(reason="the kernel is interpreted")
def test_devices_that_share_positions_know_where_theirs_begin(interpreted):
  attention = kernels.per_device(kernels.splash_attention, mesh_of(1, 2, 1, 2), RULES)
  assert_agree(attention, ruled(270, 270, TwoStreams(5, 180, 90), packed=True))
  assert interpreted[0] == (2, 256, 384)


@pytest.mark.parametrize(("t", "sizes"), [(8, (2, 2, 2)), (130, (1, 2, 1, 2))])
def test_each_row_may_begin_elsewhere(interpreted, t, sizes):
  inputs = ruled(t, 300, BlockCausal(7), b=4)
  starts = jnp.asarray(np.random.default_rng(0).integers(0, 300 - t, len(inputs[0])))
  attention = kernels.per_device(kernels.splash_attention, mesh_of(*sizes), RULES)
  assert_agree(attention, (*inputs[:3], inputs[3]._replace(start=starts)), traced=True)
  assert not interpreted


@pytest.mark.parametrize("start", [0, 70])
@pytest.mark.parametrize("rule", [BlockCausal(1), BlockCausal(4), BlockCausal(32), STREAMS, TwoStreams(4, 120, 80)])
def test_the_kernel_computes_the_rule(rule, start):
  """On numbers that it gets for the queries; rows of padding see what the last query sees."""
  mask = kernels._mask(Visible(None, rule, start), 90, (128, 256))
  tiles = [[mask[row : row + 64, column : column + 128] for column in (0, 128)] for row in (0, 64)]
  index = np.minimum(start + np.arange(128), start + 89)
  np.testing.assert_array_equal(np.block(tiles), rule(index[:, None], np.arange(256)[None]))
  np.testing.assert_array_equal(mask.mask_function(mask.q_sequence[:, None], np.arange(256)[None]), np.block(tiles))
  jaxpr = str(jax.make_jaxpr(mask.mask_function)(jnp.arange(8), jnp.arange(8)))
  assert not re.search(r"\b(div|rem|floor)\b", jaxpr), "a TPU does not divide integers"


@pytest.mark.parametrize(("kernel", "h"), [("splash", 12), ("cudnn", 16)])
def test_a_rule_that_no_kernel_serves_is_plain(interpreted, kernel, h):
  """A few queries; more are chunks."""
  inputs = ruled(128, 130, BlockCausal(4), h=h)
  np.testing.assert_array_equal(getattr(kernels, f"{kernel}_attention")(*inputs), plain_attention(*inputs))
  assert not interpreted


def pairs(text):
  """Arrays of a program with two axes that are as long as a canvas."""
  shapes = {tuple(map(int, re.findall(r"\d+", x))) for x in re.findall(r"(?<=[<\[])\d+[x,][\dx,]*", text)}
  return [shape for shape in shapes if sum(size >= 1024 for size in shape) > 1]


@pytest.mark.parametrize("rule", [BlockCausal(4), TwoStreams(32, 1024, 512)], ids=["blocks", "streams"])
def test_gpus_hold_no_array_of_all_pairs(cudnn_found, rule):
  attention = kernels.per_device(kernels.cudnn_attention, mesh_of(2, 2, 2), RULES)
  gradient = jax.value_and_grad(lambda *x: jnp.sum(attention(*x).astype(jnp.float32)), argnums=(0, 1, 2))
  text = lowered_for_cuda(gradient, 1536, 1536, h=64, rule=rule)
  assert "1536" in text
  assert not pairs(text)
  assert pairs(lowered_for_cuda(plain_attention, 1536, 1536, h=64, rule=rule))


def test_cudnn_takes_the_rule_of_a_window(cudnn_found):
  attention = kernels.per_device(kernels.cudnn_attention, mesh_of(2, 2, 2), RULES)
  operands = ["2x32x4x128xbf16", "2x58x2x128xbf16", "2x58x2x128xbf16", "2x1x32x58xbf16"]
  found = lowered_for_cuda(attention, 32, 58, rule=BlockCausal(32))
  assert cudnn_calls(found) == [("fmhaScaleBiasSoftmax", operands)]


@pytest.mark.slow(reason="the TPU's compiler")
@pytest.mark.parametrize("tpu", ["v5e:2x2"], indirect=True)
@pytest.mark.parametrize(
  ("sizes", "t", "rule"),
  [
    ((2, 1, 2), 1530, TwoStreams(6, 1020, 510)),
    ((1, 2, 1, 2), 1536, TwoStreams(32, 1024, 512)),
    ((2, 1, 2), 256, BlockCausal(32)),
  ],
)
def test_rules_compile_for_tpus(tpu, sizes, t, rule):
  mesh = mesh_of(*sizes, devices=tpu)
  attention, s = kernels.attention(mesh, RULES), max(t, 1530)
  places = [sharding(mesh, RULES, "batch", length, "heads", None) for length in ("length", None, None)]
  shapes = ((4, t, 8, 64), (4, s, 4, 64), (4, s, 4, 64))
  inputs = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=y) for x, y in zip(shapes, places, strict=True)]
  row = sharding(mesh, RULES, "batch", None)
  valid, segment = (jax.ShapeDtypeStruct((4, s), dtype, sharding=row) for dtype in (bool, jnp.int32))

  def loss(q, k, v, valid, segment):
    visible = Visible(valid, rule, s - t, segment)
    return jnp.sum(attention(q, k, v, visible).astype(jnp.float32) ** 2)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=tuple(places))
  text = (compiled := gradient.lower(*inputs, valid, segment).compile()).as_text()
  assert splash_calls(compiled) == {"dkv": 1, "dq": 1, "fwd": 1}
  assert "all-gather" not in text
  assert not pairs(text)
