import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import one_step
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.models import lora, quantize, transformer
from d1jax.models.lora import PROJECTIONS, Adapted, Adapter, LoraSpec
from d1jax.models.quantize import Quantized
from d1jax.parallel import mesh as meshes
from d1jax.run.checkpoint import Checkpoints
from d1jax.state import Frozen, TrainState, apply_gradients, create, merge, merge_for_rollout, reference
from tests import toy
from tests.models import forward

SIZE = transformer.TransformerSize(vocab=13, embed=64, heads=4, mlp=128, layers=2, rope_theta=50.0, kv_heads=2)
SPEC = LoraSpec(rank=3, alpha=7.5)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 13, (3, 7)), jnp.int32)
VALID = jnp.ones(TOKENS.shape, bool)


@pytest.fixture(scope="module")
def network():
  return transformer.build(SIZE)


@pytest.fixture(scope="module")
def logits(network):
  """Compiled once for every form of the parameters."""
  return jax.jit(lambda params, keys=None: forward.logits(network, params, TOKENS, VALID, keys))


@pytest.fixture(scope="module")
def params(network):
  return jax.jit(network.init)(jax.random.key(0))


@functools.cache
def shapes():
  """The base's, without memory."""
  return jax.eval_shape(transformer.build(SIZE).init, jax.random.key(0))


@pytest.fixture(scope="module")
def small(params):
  """The base in NF4."""
  return jax.jit(lora.quantized, static_argnums=1)(params, "nf4")


def trained(spec=SPEC):
  """Adapters as after training: `b` is not zero, and the addition is as large as the weight."""
  rng = np.random.default_rng(0)

  def draw(a):
    return jnp.asarray(
      rng.uniform(-0.125, 0.125, a.shape) if a.shape[1] > spec.rank else 0.1 * rng.normal(size=a.shape)
    )

  made = jax.eval_shape(lambda key: lora.init(key, spec, shapes()), jax.random.key(0))
  return jax.tree.map(lambda a: draw(a).astype(a.dtype), made)


def dense(params, adapter, scale):
  """The parameters with `scale * a @ b` added, in float64, by an explicit formula."""
  blocks = {name: dict(part) for name, part in params["blocks"].items()}
  for part, weights in adapter["blocks"].items():
    for name, low_rank in weights.items():
      a, b = np.asarray(low_rank.a, np.float64), np.asarray(low_rank.b, np.float64)
      layers = [w + scale * (a[i] @ b[i]) for i, w in enumerate(np.asarray(blocks[part][name], np.float64))]
      blocks[part][name] = jnp.asarray(np.stack(layers), jnp.float32)
  return {**params, "blocks": blocks}


def test_a_fresh_adapter_changes_nothing(params, logits):
  adapter = jax.jit(lora.init, static_argnums=1)(jax.random.key(3), SPEC, params)
  overlaid = lora.overlay(params, adapter)
  np.testing.assert_array_equal(logits(overlaid), logits(params))
  merged = lora.merged(overlaid)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


SUBSETS = [(name,) for name in PROJECTIONS]
SUBSETS += [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), tuple(PROJECTIONS)]


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_an_adapter_adds_alpha_by_rank_times_its_product(network, params, targets):
  """Merged weights against the formula, exactly where they are adapted and nowhere else."""
  adapter = trained(LoraSpec(3, 7.5, targets=targets))
  adapted = [(part, name) for part, weights in adapter["blocks"].items() for name in weights]
  assert sorted(adapted) == sorted(PROJECTIONS[target] for target in targets)
  merged, expected = lora.merged(lora.overlay(params, adapter)), dense(params, adapter, 2.5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=jax.tree_util.keystr(path))
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), merged, params)
  changed = {tuple(e.key for e in path)[1:] for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if leaf}
  assert changed == set(adapted)


@pytest.mark.parametrize("targets", [("down_proj", "o_proj"), tuple(PROJECTIONS)], ids="+".join)
def test_merged_and_unmerged_agree(params, logits, targets):
  adapter = trained(LoraSpec(3, 7.5, targets=targets))
  overlaid = lora.overlay(params, adapter)
  apart, merged = np.asarray(logits(overlaid)), np.asarray(logits(lora.merged(overlaid)))
  formula = np.asarray(logits(dense(params, adapter, 2.5)))
  np.testing.assert_allclose(apart, merged, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(merged, formula, rtol=1e-5, atol=1e-5)
  assert np.abs(apart - np.asarray(logits(params))).mean() > 0.01 * np.abs(apart).mean()


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 7.5), (8, 2.0)])
def test_the_scale_is_alpha_by_rank(params, rank, alpha):
  adapter = trained(LoraSpec(rank, alpha, targets=("up_proj",)))
  up = adapter["blocks"]["mlp"]["up"]
  assert (up.a.shape, up.b.shape, up.scale) == ((2, 64, rank), (2, rank, 128), alpha / rank)
  found = lora.merged(lora.overlay(params, adapter))["blocks"]["mlp"]["up"]
  expected = dense(params, adapter, alpha / rank)["blocks"]["mlp"]["up"]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(params):
  base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  merged = jax.jit(lora.merged)(lora.overlay(base, trained()))
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
  exact = jax.jit(lora.merged)(lora.overlay(jax.tree.map(lambda w: w.astype(jnp.float32), base), trained()))
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(exact), strict=True):
    rounded = np.asarray(b).astype(ml_dtypes.bfloat16)
    assert np.asarray(a).tobytes() == rounded.tobytes(), jax.tree_util.keystr(path)


def test_a_quantised_base_stays_unmerged(params, small, logits):
  base = small
  overlaid = lora.overlay(base, trained())
  merged = lora.merged(overlaid)
  assert jax.tree.structure(merged) == jax.tree.structure(overlaid)
  query = merged["blocks"]["attention"]["query"]
  assert isinstance(query, Adapted)
  assert isinstance(query.base, Quantized)
  assert query.base is overlaid["blocks"]["attention"]["query"].base
  of = lambda leaf: quantize.dequantize(leaf) if isinstance(leaf, Quantized) else leaf
  back = jax.jit(lambda tree: jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized)))(base)
  np.testing.assert_allclose(logits(overlaid), logits(dense(back, trained(), 2.5)), rtol=1e-5, atol=2e-5)


def test_quantised_parameters_are_the_projections_alone(network, params, small):
  is_small = lambda leaf: isinstance(leaf, Quantized)
  places = jax.tree_util.tree_leaves_with_path(small, is_leaf=is_small)
  found = {tuple(entry.key for entry in path)[1:] for path, leaf in places if is_small(leaf)}
  assert found == set(PROJECTIONS.values())
  for (path, leaf), whole in zip(places, jax.tree.leaves(params), strict=True):
    if is_small(leaf):
      alone = jax.jit(quantize.quantize, static_argnums=1)(whole, "nf4")
      jax.tree.map(np.testing.assert_array_equal, leaf, alone)
    else:
      np.testing.assert_array_equal(leaf, whole, err_msg=jax.tree_util.keystr(path))
  named = lambda leaf: isinstance(leaf, tuple)
  assert jax.tree.map(len, lora.quantized_axes(network.axes), is_leaf=named) == jax.tree.map(jnp.ndim, small)


@pytest.mark.parametrize("targets", SUBSETS[-3:], ids="+".join)
def test_axes_match_the_trees(network, targets):
  """Each side names its long axis, which may be cut, and not its rank, which may not."""
  spec = LoraSpec(3, 7.5, 0.1, targets)
  adapter, axes = trained(spec), lora.axes(spec, network.axes)
  named = lambda leaf: isinstance(leaf, tuple)
  assert jax.tree.structure(axes, is_leaf=named) == jax.tree.structure(adapter)
  for names, leaf in zip(jax.tree.leaves(axes, is_leaf=named), jax.tree.leaves(adapter), strict=True):
    assert (len(names), names[0], leaf.shape[0]) == (3, "layers", 2)
    assert [size for name, size in zip(names, leaf.shape, strict=True) if name is None] == [3]
    assert {*names, "embed", "adapter"} == {"layers", "embed", "adapter", None}
  meshes.shardings(meshes.make_mesh(dict(data=1, fsdp=4, tensor=2)), meshes.RULES, axes)  # every name has a rule


def test_a_starts_uniform_and_b_at_zero(params):
  spec = LoraSpec(32, 32.0)
  adapter = jax.jit(lora.init, static_argnums=1)(jax.random.key(5), spec, params)
  seen = []
  for part, name in PROJECTIONS.values():
    one = adapter["blocks"][part][name]
    assert one.a.dtype == one.b.dtype == jnp.float32
    bound = one.a.shape[1] ** -0.5
    assert float(jnp.max(jnp.abs(one.a))) <= bound
    assert float(jnp.max(one.a)) > 0.98 * bound
    assert float(jnp.std(one.a)) == pytest.approx(bound / np.sqrt(3), rel=0.03)
    assert not one.b.any()
    seen += [np.asarray(one.a[0]).ravel()[:1000], np.asarray(one.a[1]).ravel()[:1000]]
  assert np.abs(np.corrcoef(seen) - np.eye(len(seen))).max() < 0.2, "two adapters start alike"


def test_a_subset_of_targets_starts_as_it_does_among_all(params):
  init = jax.jit(lora.init, static_argnums=1)
  whole = init(jax.random.key(5), LoraSpec(2, 2.0), params)
  part = init(jax.random.key(5), LoraSpec(2, 2.0, targets=("down_proj", "v_proj")), params)
  assert part["blocks"].keys() == {"attention", "mlp"}
  np.testing.assert_array_equal(part["blocks"]["attention"]["value"].a, whole["blocks"]["attention"]["value"].a)
  np.testing.assert_array_equal(part["blocks"]["mlp"]["down"].a, whole["blocks"]["mlp"]["down"].a)


def token_keys(seed, rows=range(3)):
  row = lambda r: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), r), i))
  return jnp.stack([row(r)(jnp.arange(TOKENS.shape[1])) for r in rows])


def with_dropout(rate):
  """The same two trained adapters a layer, with another rate."""
  return trained(LoraSpec(3, 7.5, rate, ("q_proj", "down_proj")))


@pytest.mark.slow(reason="compiles programs of its own")
def test_nothing_is_dropped_without_keys_or_at_rate_zero(params, logits):
  plain = logits(lora.overlay(params, with_dropout(0.0)))
  np.testing.assert_array_equal(logits(lora.overlay(params, with_dropout(0.5))), plain)
  np.testing.assert_array_equal(logits(lora.overlay(params, with_dropout(0.0)), token_keys(0)), plain)
  assert np.abs(np.asarray(logits(lora.overlay(params, with_dropout(0.5)), token_keys(0)) - plain)).mean() > 1e-3
  np.testing.assert_array_equal(logits(params, token_keys(0)), logits(params))


def test_dropout_is_keyed_by_token(network, params):
  """The same tokens and keys in another order of the batch, or beside other rows, give the same rows."""
  run = jax.jit(lambda p, t, k: network.encode(p, t, jnp.ones(t.shape, bool), k))
  overlaid, keys = lora.overlay(params, with_dropout(0.3)), token_keys(4)
  base, order = run(overlaid, TOKENS, keys), jnp.asarray([2, 0, 1])
  np.testing.assert_array_equal(run(overlaid, TOKENS[order], keys[order]), base[order])
  others = run(overlaid, TOKENS.at[1:].set(0), jnp.concatenate([keys[:1], token_keys(9, (5, 6))]))
  np.testing.assert_array_equal(others[0], base[0])
  assert (np.abs(np.asarray(run(overlaid, TOKENS, token_keys(5)) - base)).max(-1) > 1e-4).all()


def test_dropout_drops_inputs_of_the_adapter_alone_and_is_right_in_the_mean():
  """One projection, many keys: a mean of the exact product, and each draw a sum over kept inputs / (1 - rate)."""
  rng, rate = np.random.default_rng(0), 0.25
  x, w = rng.normal(size=(1, 1, 8)), rng.normal(size=(8, 5))
  a, b = rng.normal(size=(8, 2)), rng.normal(size=(2, 5))
  to = lambda value: jnp.asarray(value, jnp.float32)
  adapted = Adapted(to(w), Adapter(to(a), to(b), 1.5, rate))
  keys = jax.random.split(jax.random.key(0), 4000)
  draw = jax.jit(jax.vmap(lambda key: lora.project(adapted, to(x), jnp.float32, key[None, None])[0, 0]))
  found = np.asarray(draw(keys), np.float64)
  masks = np.asarray(list(itertools.product([0.0, 1.0], repeat=8)))
  possible = x[0, 0] @ w + 1.5 * (masks * x[0, 0] / (1 - rate)) @ a @ b
  distance = np.abs(found[:, None] - possible[None]).max(-1)
  assert distance.min(1).max() < 1e-4, "an input is neither kept nor dropped, or the base was dropped"
  which = masks[distance.argmin(1)]
  error = np.sqrt(rate * (1 - rate) / len(keys))
  assert np.abs(which.mean(0) - (1 - rate)).max() < 4 * error
  exact = (x @ w + 1.5 * x @ a @ b)[0, 0]
  assert (np.abs(found.mean(0) - exact) < 4 * found.std(0) / np.sqrt(len(keys))).all()


def test_dropout_is_off_in_scoring(network, params):
  denoiser = Denoiser(network.encode, network.head, toy.MASK, (toy.STOP,), toy.FORBIDDEN, toy.VOCAB)
  rollout, spec = toy.rollout(), SamplerSpec(completion_length=6, diffusion_steps=3, block_length=6)

  @jax.jit
  def scores(params):
    return one_step(denoiser, params, rollout, spec, jax.random.key(0), p_mask_prompt=0.2).logp

  without, dropping = (lora.overlay(params, with_dropout(rate)) for rate in (0.0, 0.5))
  np.testing.assert_array_equal(scores(dropping), scores(without))


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"targets": ("q_proj", "ff_proj", "attn_out")}, "ff_proj, attn_out match no projection; known: q_proj"),
    ({"targets": ("q_proj", "q_proj")}, r"\('q_proj', 'q_proj'\) are empty or name a projection twice"),
    ({"targets": ()}, r"\(\) are empty"),
    ({"targets": ("Q_PROJ",)}, "Q_PROJ"),
    ({"rank": 0}, "rank=0"),
    ({"rank": -1}, "rank=-1"),
    ({"alpha": 0.0}, "alpha=0.0"),
    ({"alpha": float("nan")}, "alpha=nan"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"),
  ],
)
def test_what_a_description_may_not_say(changes, named):
  with pytest.raises(ValueError, match=named):
    LoraSpec(**{"rank": 4, "alpha": 8.0, **changes})


def test_an_adapter_of_an_unknown_place_is_refused(params):
  one = trained()["blocks"]["mlp"]["up"]
  for tree, named in (
    ({"blocks": {"mlp": {"middle": one}}}, "middle where the parameters have .*gate"),
    ({"blocks": {"router": {"up": one}}}, "router where the parameters have attention"),
    ({"layers": {}}, "layers where the parameters have .*embedding"),
    ({"blocks": {"mlp": one}}, "Adapter where the parameters have .*gate"),
    ({"head": {"up": one}}, "up where the parameters have a weight"),
    ({"blocks": {"mlp": {"up": one.a}}}, "where the parameters have a weight"),
  ):
    with pytest.raises(ValueError, match=named):
      lora.overlay(params, tree)


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_adapter_alone_gets_gradients(network, params, small):
  """Of both forms of a base: the gradient's tree is the adapter's, `b`'s is not zero at the start and `a`'s is."""
  optimizer = optax.sgd(0.1)
  state = jax.jit(
    lambda: create(lambda key: lora.init(key, SPEC, shapes()), optimizer, jax.random.key(0), jax.random.key(1))
  )()

  def loss(trainable, frozen):
    merged = merge(trainable, frozen)
    return jnp.mean(forward.logits(network, merged, TOKENS, VALID) ** 2)

  assert reference(Frozen(small, {})) is small
  gradient = jax.jit(jax.grad(loss))(state.trainable, Frozen(small, {}))
  assert jax.tree.structure(gradient) == jax.tree.structure(state.trainable)
  of_float = jax.eval_shape(jax.grad(loss), state.trainable, Frozen(params, {}))
  assert jax.tree.structure(of_float) == jax.tree.structure(state.trainable)
  new = apply_gradients(state, gradient, optimizer, jnp.bool_(True))
  for part, name in PROJECTIONS.values():
    one = gradient["blocks"][part][name]
    assert not one.a.any()
    assert np.asarray(one.b).any(axis=(1, 2)).all(), "a layer gets no gradient"
    np.testing.assert_allclose(new.trainable["blocks"][part][name].b, -0.1 * np.asarray(one.b), rtol=1e-6)


def test_merge_for_rollout_merges_a_float_base(params):
  adapter, frozen = trained(), Frozen(params, {})
  found = merge_for_rollout(adapter, frozen)
  assert jax.tree.structure(found) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, found, lora.merged(lora.overlay(params, adapter)))


@pytest.mark.slow(reason="compiles an update on two meshes")
def test_adapters_are_trained_saved_and_restored_on_another_mesh(tmp_path, network):
  """AdamW, donation and Orbax see the tree as any other; its static parts come from the abstract state."""
  spec, optimizer = LoraSpec(4, 8.0, 0.1), optax.adamw(1e-2)
  axes = lora.axes(spec, network.axes)
  abstract = jax.eval_shape(lambda: lora.init(jax.random.key(0), spec, shapes()))
  state_of = lambda: create(lambda key: lora.init(key, spec, shapes()), optimizer, jax.random.key(0), jax.random.key(1))

  def placement(sizes):
    return meshes.state_shardings(meshes.make_mesh(sizes), meshes.RULES, axes, abstract, optimizer)

  here, there = placement(dict(data=1, fsdp=4, tensor=2)), placement(dict(data=2, fsdp=2, tensor=2))
  state = jax.jit(state_of, out_shardings=here)()
  grad = jax.tree.map(lambda a: jnp.ones_like(a), state.trainable)
  step = jax.jit(
    lambda state, grad: apply_gradients(state, grad, optimizer, jnp.bool_(True)),
    in_shardings=(here, here.trainable),
    out_shardings=here,
    donate_argnums=0,
  )
  before = state.trainable["blocks"]["mlp"]["up"].b
  stepped = step(state, grad)
  assert before.is_deleted()
  assert isinstance(stepped, TrainState)
  up = stepped.trainable["blocks"]["mlp"]["up"]
  assert (up.scale, up.dropout) == (2.0, 0.1)
  np.testing.assert_allclose(up.b, -1e-2, rtol=1e-4)  # Adam's first step is the learning rate

  checkpoints = Checkpoints(tmp_path / "adapters", writes=True)
  checkpoints.save(1, stepped, {"config": {}, "seconds": 0.0}, None)
  checkpoints.wait()
  restored = checkpoints.restore(1, meshes.with_placements(jax.eval_shape(state_of), there))
  checkpoints.close()
  assert jax.tree.structure(restored.state) == jax.tree.structure(stepped)
  for a, b, s in zip(*map(jax.tree.leaves, (restored.state, stepped, there)), strict=True):
    assert a.sharding.is_equivalent_to(s, a.ndim)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
