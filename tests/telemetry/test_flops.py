"""Products of traces: networks against formulas, and each way in which a program can hold another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from d1jax.diffusion.vocabulary import REPEATED, tiled_log_prob
from d1jax.models import lora, transformer
from d1jax.models.families import PRESETS
from d1jax.models.layers import Visible, plain_attention
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import TransformerSize
from d1jax.models.visibility import BlockCausal, TwoStreams
from d1jax.parallel import attention as kernels
from d1jax.parallel.mesh import RULES
from d1jax.telemetry import flops
from d1jax.telemetry.flops import Products
from tests.parallel.test_attention import mesh_of
from tests.telemetry import formulas

GROUPED = TransformerSize(vocab=40, embed=24, heads=6, mlp=50, layers=3, kv_heads=2, qkv_bias=True)
TIED = TransformerSize(vocab=33, embed=16, heads=2, mlp=20, layers=2, head_dim=12, tied=True)
SIZES = pytest.mark.parametrize("size", [PRESETS["tiny"], GROUPED, TIED], ids=["tiny", "grouped", "tied"])
ADAPTERS = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


def count(function, *arguments):
  return flops.count(jax.jit(function).trace(*arguments))


def total(function, *arguments):
  return flops.total(count(function, *arguments).values())


def shapes(network):
  return jax.eval_shape(network.init, jax.random.key(0))


def logits(network, predicted, params, tokens, valid):
  return network.encode(params, tokens, valid)[:, :predicted] @ network.head(params)


@pytest.mark.few(3, reason="each case traces programs of its own")
@SIZES
@pytest.mark.parametrize(("rows", "canvas", "predicted"), [(1, 7, 7), (3, 12, 5), (2, 9, 0)])
def test_a_pass_over_the_canvas(size, rows, canvas, predicted):
  network = transformer.build(size)
  tokens, valid = jnp.zeros((rows, canvas), int), jnp.ones((rows, canvas), bool)
  found = total(functools.partial(logits, network, predicted), shapes(network), tokens, valid)
  assert found.flops == formulas.forward(size, rows, canvas, canvas, predicted)


@pytest.mark.few(3, reason="each case traces programs of its own")
@SIZES
@pytest.mark.parametrize("window", [1, 5, 11])
def test_a_window_attends_to_the_cached_canvas(size, window):
  network, rows, canvas = transformer.build(size), 2, 12

  def windowed(params, tokens, valid):
    hidden, _ = network.encode_window(params, tokens, 1, network.init_cache(valid))
    return hidden @ network.head(params)

  tokens, valid = jnp.zeros((rows, window), int), jnp.ones((rows, canvas), bool)
  found = total(windowed, shapes(network), tokens, valid)
  assert found.flops == formulas.forward(size, rows, window, canvas, window)


@pytest.mark.few(3, reason="each case traces programs of its own")
@SIZES
@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["full", "adapters"])
def test_forward_and_backward_of_what_is_trained(size, adapters):
  network, rows, canvas, predicted = transformer.build(size), 2, 10, 6
  base = shapes(network)
  trained = jax.eval_shape(lambda key: lora.init(key, adapters, base), jax.random.key(0)) if adapters else base

  def loss(trained, base, tokens, valid):
    params = lora.overlay(base, trained) if adapters else trained
    return jnp.sum(logits(network, predicted, params, tokens, valid))

  tokens, valid = jnp.zeros((rows, canvas), int), jnp.ones((rows, canvas), bool)
  passed = formulas.products(size, rows, canvas, canvas, predicted, adapters)
  assert total(loss, trained, base, tokens, valid).flops == sum(passed)
  assert total(jax.value_and_grad(loss), trained, base, tokens, valid).flops == sum(passed) + formulas.backward(passed)
  assert (passed.adapters > 0) == (adapters is not None)


def test_an_8b_model_has_two_flops_a_weight_and_token():
  """LLaDA-8B: 8.02e9 weights, of which the embedding, 0.52e9, is looked up and not multiplied."""
  size = PRESETS["llada_8b"]
  passed = formulas.products(size, 1, 1, 1, 1)
  weights = transformer.parameter_count(transformer.build(size))
  norms = size.embed * (2 * size.layers + 1)
  assert passed.projections + passed.head == 2 * (weights - size.vocab * size.embed - norms)
  assert passed.attention == 4 * size.layers * size.embed


X, W = jnp.ones((3, 4)), jnp.ones((4, 4))
ONE = 2 * 3 * 4 * 4
"""FLOPs of X @ W."""


def scanned(body, length):
  return lambda x, w: jax.lax.scan(lambda x, _: (body(x, w), None), x, None, length=length)[0]


def product(x, w):
  return x @ w


def recomputed(x, w):
  return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x))


@pytest.mark.parametrize(
  ("function", "expected"),
  [
    (product, (1, 0)),
    (scanned(product, 5), (5, 0)),
    (scanned(scanned(product, 5), 3), (15, 0)),
    (lambda x, w: jax.lax.fori_loop(0, 7, lambda _, x: x @ w, x), (7, 0)),
    (lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x), (1, 0)),
    (lambda x, w: jax.lax.cond(x[0, 0] < 9, scanned(product, 2), lambda x, w: x, x, w), (2, 0)),
    (lambda x, w: jax.jit(product)(x, w) + jax.nn.relu(x @ w), (2, 0)),
    (lambda x, w: (x @ w @ w, x)[1], (0, 0)),
    (lambda x, w: jnp.vdot(x, x) + jnp.einsum("bd,bd->b", x, x), (0, 0)),
    (lambda x, w: jax.vmap(product, (0, None))(x[:, None], w), (1, 0)),
    (lambda x, w: jax.lax.conv(x[None, None], w[None, None, :2, :2], (1, 1), "SAME"), (2 * 3 * 4 * 4 / ONE, 0)),
    (jax.value_and_grad(lambda x, w: jnp.sum(x @ w)), (2, 0)),
    (jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1)), (3, 0)),
    (jax.checkpoint(product), (1, 0)),
    (jax.value_and_grad(recomputed), (4, 2)),
    (jax.value_and_grad(lambda x, w: recomputed(jax.lax.map(lambda x: x @ w, x[:, None])[:, 0], w)), (6, 2)),
  ],
)
def test_each_way_to_hold_a_program(function, expected):
  found = total(function, X, W)
  assert (found.flops, found.repeated) == tuple(ONE * each for each in expected)


def test_scopes_are_told_apart_in_both_directions():
  def loss(x, w):
    with jax.named_scope("d1jax.first"):
      x = scanned(product, 3)(x, w)
    with jax.named_scope("d1jax.second"), jax.named_scope("d1jax.third"):
      return jnp.sum(jnp.sin(x @ w))

  found = count(jax.value_and_grad(loss), X, W)
  assert found == {
    frozenset({"d1jax.first"}): Products(6 * ONE),
    frozenset({"d1jax.second", "d1jax.third"}): Products(2 * ONE),
  }


@pytest.mark.parametrize("tile", [8, 12])
def test_tiles_of_the_vocabulary(tile):
  """The last of four tiles of 12 computes eight of 40 columns once more."""
  hidden, head, tokens = jnp.ones((6, 5)), jnp.ones((5, 40)), jnp.zeros(6, int)
  one = 2 * 6 * 5 * (-(-40 // tile) * tile)
  logp = lambda hidden, head: jnp.sum(tiled_log_prob(hidden, head, tokens, (), tile))
  assert total(logp, hidden, head) == Products(one)
  assert total(jax.value_and_grad(logp), hidden, head) == Products(2 * one, one), "nobody asks for the head's gradient"
  assert total(jax.value_and_grad(logp, (0, 1)), hidden, head) == Products(3 * one, one)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("kernel", [kernels.splash_attention, kernels.cudnn_attention, plain_attention])
def test_kernels_count_as_the_products_that_they_stand_for(kernel, sizes, monkeypatch):
  """Neither what a kernel pads to its blocks nor what its backward pass computes again."""
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  b, t, s, n, k, h = 4, 400, 400, 8, 4, 16
  arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h))]
  arguments.append(Visible(jax.ShapeDtypeStruct((b, s), bool)))
  attend = kernels.per_device(kernel, mesh_of(*sizes), RULES) if sizes else kernel
  gradient = jax.value_and_grad(lambda *x: jnp.sum(attend(*x).astype(jnp.float32)), argnums=(0, 1, 2))
  forward = 4 * b * n * t * s * h
  assert total(attend, *arguments) == Products(forward)
  assert total(gradient, *arguments) == Products(3 * forward)
  again = jax.value_and_grad(
    lambda *x: jnp.sum(jnp.sin(jax.checkpoint(attend)(*x)).astype(jnp.float32)), argnums=(0, 1, 2)
  )
  # Mixing, the last product, is not computed again, unless one kernel does both.
  assert total(again, *arguments) == Products(3 * forward, forward // (2 if kernel is plain_attention else 1))


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("rule", [BlockCausal(4), TwoStreams(5, 200, 100)])
def test_a_kernel_counts_the_pairs_that_a_rule_allows(rule, sizes):
  """On devices that share the positions, each one the mean; of a window whose start is traced, all pairs."""
  b, s, n, k, h = 4, 300, 8, 4, 16
  arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b, s, n, h), (b, s, k, h), (b, s, k, h))]
  arguments.append(jax.ShapeDtypeStruct((b, s), bool))
  kernel = kernels.per_device(kernels.splash_attention, mesh_of(*sizes), RULES) if sizes else kernels.splash_attention
  attend = lambda q, k, v, valid, start=0: kernel(q, k, v, Visible(valid, rule, start))
  gradient = jax.value_and_grad(lambda *x: jnp.sum(attend(*x).astype(jnp.float32)), argnums=(0, 1, 2))
  allowed = int(rule(np.arange(s)[:, None], np.arange(s)[None]).sum())
  assert total(gradient, *arguments) == Products(3 * 4 * b * n * h * allowed)
  assert total(attend, *arguments, 0) == Products(4 * b * n * h * s * s)


def test_the_scope_of_what_is_repeated_is_that_of_jax():
  text = str(jax.make_jaxpr(jax.value_and_grad(recomputed))(X, W).pretty_print(name_stack=True))
  assert REPEATED in text
