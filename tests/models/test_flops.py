"""Formulas against the products of the traced network, one by one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from d1jax.models import flops, lora, transformer
from d1jax.models.families import PRESETS
from d1jax.models.lora import LoraSpec
from d1jax.models.transformer import TransformerSize
from tests.jaxprs import dot_flops

GROUPED = TransformerSize(vocab=40, embed=24, heads=6, mlp=50, layers=3, kv_heads=2, qkv_bias=True)
TIED = TransformerSize(vocab=33, embed=16, heads=2, mlp=20, layers=2, head_dim=12, tied=True)
SIZES = pytest.mark.parametrize("size", [PRESETS["tiny"], GROUPED, TIED], ids=["tiny", "grouped", "tied"])
ADAPTERS = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


def shapes(network):
  return jax.eval_shape(network.init, jax.random.key(0))


def logits(network, predicted, params, tokens, valid):
  return network.encode(params, tokens, valid)[:, :predicted] @ network.head(params)


@pytest.mark.few(3, reason="each case compiles programs of its own")
@SIZES
@pytest.mark.parametrize(("rows", "canvas", "predicted"), [(1, 7, 7), (3, 12, 5), (2, 9, 0)])
def test_a_pass_over_the_canvas(size, rows, canvas, predicted):
  network = transformer.build(size)
  tokens, valid = jnp.zeros((rows, canvas), int), jnp.ones((rows, canvas), bool)
  counted = dot_flops(functools.partial(logits, network, predicted), shapes(network), tokens, valid)
  assert flops.forward(size, rows, canvas, canvas, predicted) == counted


@pytest.mark.few(3, reason="each case compiles programs of its own")
@SIZES
@pytest.mark.parametrize("window", [1, 5, 11])
def test_a_window_attends_to_the_cached_canvas(size, window):
  network, rows, canvas = transformer.build(size), 2, 12

  def windowed(params, tokens, valid):
    hidden, _ = network.encode_window(params, tokens, 1, network.init_cache(valid))
    return hidden @ network.head(params)

  tokens, valid = jnp.zeros((rows, window), int), jnp.ones((rows, canvas), bool)
  assert flops.forward(size, rows, window, canvas, window) == dot_flops(windowed, shapes(network), tokens, valid)


@pytest.mark.few(3, reason="each case compiles programs of its own")
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
  passed = flops.products(size, rows, canvas, canvas, predicted, adapters)
  assert sum(passed) == dot_flops(loss, trained, base, tokens, valid)
  assert sum(passed) + flops.backward(passed) == dot_flops(jax.grad(loss), trained, base, tokens, valid)
  assert (passed.adapters > 0) == (adapters is not None)


def test_an_8b_model_has_two_flops_a_weight_and_token():
  """LLaDA-8B: 8.02e9 weights, of which the embedding, 0.52e9, is looked up and not multiplied."""
  size = PRESETS["llada_8b"]
  passed = flops.products(size, 1, 1, 1, 1)
  weights = transformer.parameter_count(transformer.build(size))
  norms = size.embed * (2 * size.layers + 1)
  assert passed.projections + passed.head == 2 * (weights - size.vocab * size.embed - norms)
  assert passed.attention == 4 * size.layers * size.embed
