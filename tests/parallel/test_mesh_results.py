"""What is computed does not depend on the mesh."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from d1jax import keys
from d1jax import optimizer as optimizers
from d1jax.aot import collectives, hlo
from d1jax.diffusion.continuous import sample_in_slots
from d1jax.diffusion.corruption import corrupt, mask_prompt
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.model import build_denoiser
from d1jax.models.transformer import TransformerSize, build
from d1jax.parallel.attention import attention
from d1jax.parallel.mesh import (
  MESH_AXES,
  RULES,
  constrained,
  constrainer,
  make_mesh,
  place,
  sharding,
  shardings,
  state_shardings,
  ways,
)
from d1jax.rl.estimators import ESTIMATORS
from d1jax.rl.losses import ClippedToken
from d1jax.rl.method import Method
from d1jax.rl.update import update
from d1jax.state import Frozen, TrainState, create
from tests import toy

SIZE = TransformerSize(vocab=16, embed=16, heads=4, mlp=32, layers=2, rope_theta=100.0)
OPTIMIZER = optimizers.adamw(
  learning_rate=1e-3, steps=10, warmup_steps=0, decay="constant", b1=0.9, b2=0.99, weight_decay=0.1, max_grad_norm=1.0
)
SAMPLER = SamplerSpec(completion_length=8, diffusion_steps=4, block_length=4)
ESTIMATOR = ESTIMATORS["one_step"].bind(p_mask_prompt=0.3, tile=4)
UPDATE = Method(ESTIMATOR, ClippedToken(epsilon=0.2, beta=0.1), num_iterations=2, accumulation=2)
KEY = jax.random.key(2)
ROWS = 16
PROMPT, VALID = toy.prompts([1 + i % 5 for i in range(ROWS)], 8)
IDS = jnp.arange(100, 100 + ROWS, dtype=jnp.int32)
ADVANTAGES = np.random.default_rng(0).normal(size=ROWS).astype(np.float32)


def mesh_of(*sizes: int) -> Mesh:
  devices = jax.devices()[: int(np.prod(sizes))]
  return make_mesh(dict(zip(MESH_AXES, sizes, strict=False)), devices)


def host_params() -> Any:
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(build(SIZE).init, KEY)
  return jax.tree.map(lambda a: (0.4 * rng.normal(size=a.shape)).astype(np.float32), shapes)


@dataclasses.dataclass
class World:
  """One mesh, and what is computed on it, by a network with full attention or with blocks."""

  mesh: Mesh
  block: int | None = None

  def __post_init__(self):
    self.network = build(
      SIZE,
      constrain=constrainer(self.mesh, RULES),
      attention=attention(self.mesh, RULES),
      cut_length=ways(self.mesh, RULES, "length") > 1,
      remat=True,
    )
    self.denoiser = Denoiser(
      self.network.encode, self.network.head, toy.MASK, (toy.STOP,), (11, 12, 13, 14, 15), SIZE.vocab
    )
    self.method = UPDATE
    if self.block is not None:
      self.denoiser = build_denoiser(
        self.network, mask_id=toy.MASK, stop_ids=(toy.STOP,), known_ids=12, block=self.block
      )
      self.method = dataclasses.replace(UPDATE, estimator=ESTIMATORS["step_merged"])
    self.rows, self.scalar = sharding(self.mesh, RULES, "batch"), sharding(self.mesh, RULES)
    self.params = shardings(self.mesh, RULES, self.network.axes)
    abstract = jax.eval_shape(self.network.init, KEY)
    self.state = state_shardings(self.mesh, RULES, self.network.axes, abstract, OPTIMIZER)

  def fresh_state(self) -> TrainState:
    state = create(lambda _: jax.tree.map(jnp.asarray, host_params()), OPTIMIZER, jax.random.key(4), KEY)
    return jax.device_put(state, self.state)

  def batch(self) -> tuple[jax.Array, ...]:
    return place(tuple(np.asarray(x) for x in (PROMPT, VALID, IDS, IDS // 4)), self.rows)

  def rollout(self) -> Any:
    program = jax.jit(
      lambda params, batch, key: sample(self.denoiser, params, *batch, key, spec=SAMPLER),
      in_shardings=(self.params, self.rows, self.scalar),
      out_shardings=self.rows,
    )
    return program(jax.device_put(host_params(), self.params), self.batch(), KEY)

  def rollout_in_slots(self, slots: int) -> Any:
    """A rollout whose rows end early, and the program."""
    spec = dataclasses.replace(SAMPLER, completion_length=16, diffusion_steps=8, early_exit=True)
    denoiser = dataclasses.replace(self.denoiser, stop_ids=(2, 5, 7))
    by_row, everywhere = (functools.partial(constrained, placement=one) for one in (self.rows, self.scalar))
    options = dict(spec=spec, row_multiple=ways(self.mesh, RULES, "batch"), slots=slots)
    program = jax.jit(
      lambda params, batch, key: sample_in_slots(
        denoiser, params, *batch, key, by_row=by_row, everywhere=everywhere, **options
      ),
      in_shardings=(self.params, self.rows, self.scalar),
      out_shardings=self.rows,
    )
    arguments = (jax.device_put(host_params(), self.params), self.batch(), KEY)
    compiled = program.lower(*arguments).compile()
    return jax.device_get(compiled(*arguments)), compiled

  def compile_update(self, rollout: Any, state: TrainState) -> tuple[Any, Any]:
    def program(state, frozen, rollout, advantages):
      return update(
        state,
        frozen,
        rollout,
        advantages,
        method=self.method,
        denoiser=self.denoiser,
        sampler=SAMPLER,
        optimizer=OPTIMIZER,
      )

    jitted = jax.jit(
      program,
      in_shardings=(self.state, Frozen({}, self.params), self.rows, self.rows),
      out_shardings=(self.state, self.scalar),
      donate_argnums=0,
    )
    reference = jax.device_put(jax.tree.map(lambda x: 0.9 * x, host_params()), self.params)
    arguments = (Frozen({}, reference), place(rollout, self.rows), place(ADVANTAGES, self.rows))
    return jitted.lower(state, *arguments).compile(), arguments


def draws(world: World) -> list[np.ndarray]:
  """Everything random that is not a token: keys, uniforms, prompt masks, corruption."""

  def program(prompt, valid, ids, groups, key):
    per_sample = keys.sample_keys(keys.purpose_key(key, keys.Purpose.ROLLOUT, 3), ids)
    noisy = corrupt(key, ids, prompt, toy.MASK)
    masked = mask_prompt(key, ids, prompt, valid, 0.3, toy.MASK)
    return prompt, valid, jax.random.key_data(per_sample), keys.uniforms(per_sample, 33), masked, *noisy

  jitted = jax.jit(program, in_shardings=(world.rows,) * 4 + (world.scalar,), out_shardings=world.rows)
  return jax.device_get(jitted(*world.batch(), KEY))


@dataclasses.dataclass
class Results:
  """What one world computes from the same inputs."""

  world: World
  draws: list[np.ndarray]
  rollout: Any
  old_state: TrainState
  new_state: TrainState
  metrics: Any
  alias_bytes: int


def results(world: World, rollout: Any) -> Results:
  own = jax.device_get(world.rollout())
  state = world.fresh_state()
  program, arguments = world.compile_update(own if rollout is None else rollout, state)
  new_state, metrics = program(state, *arguments)
  alias = program.memory_analysis().alias_size_in_bytes
  return Results(world, draws(world), own, state, new_state, jax.device_get(metrics), alias)


SLOW = pytest.mark.slow(reason="one mesh more, for which everything is compiled")
MESHES = [
  (2, 2, 2),
  pytest.param((1, 2, 1, 4), marks=SLOW),
  pytest.param((1, 8, 1), marks=SLOW),
  pytest.param((1, 2, 4), marks=SLOW),
  pytest.param((1, 2, 2, 2), marks=SLOW),
]


@pytest.fixture(scope="module")
def one_device() -> Results:
  return results(World(mesh_of(1, 1, 1)), None)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def other(request, one_device) -> Results:
  return results(World(mesh_of(*request.param)), one_device.rollout)


def test_prompts_keys_masks_and_uniforms_are_the_same_bits(one_device, other):
  for a, b in zip(one_device.draws, other.draws, strict=True):
    np.testing.assert_array_equal(a, b)


def test_sampled_tokens_are_the_same(one_device, other):
  assert_same_rollouts(one_device.rollout, other.rollout)


def assert_same_rollouts(a, b):
  assert len({row.tobytes() for row in a.completion}) == ROWS
  for name in a._fields:
    if name != "reveal_logp":
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
  np.testing.assert_allclose(a.reveal_logp, b.reveal_logp, atol=1e-5)


def test_an_update_agrees(one_device, other):
  assert_same_updates(one_device, other)


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_block_causal_network_does_the_same_on_any_mesh():
  """The cached sampler draws the same bits on 1 and 8 devices, and the exact path trains alike."""
  one = results(World(mesh_of(1, 1, 1), 4), None)
  other = results(World(mesh_of(2, 2, 2), 4), one.rollout)
  assert_same_rollouts(one.rollout, other.rollout)
  assert_same_updates(one, other)


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("block", [None, 4])
def test_rollouts_in_slots_are_the_same_on_any_mesh_and_no_cache_is_sent(block):
  """On one device with two slots, and on four and eight devices with eight."""
  one, _ = World(mesh_of(1, 1, 1), block).rollout_in_slots(2)
  assert len(set(one.completion_mask.sum(axis=1).tolist())) > 4, "rows should end at different places"
  for sizes in ((2, 2, 2), (4, 1, 1)):
    other, compiled = World(mesh_of(*sizes), block).rollout_in_slots(8)
    assert_same_rollouts(one, other)
  sent = [c for c in collectives.find(hlo.parse(compiled.as_text()), 4) if c.in_loop]
  canvases = ROWS * (8 + 16 + (block or 0))
  assert max(math.prod(shape.dims) for c in sent for shape in c.shapes) <= canvases


def assert_same_updates(one_device, other):
  moved = [
    np.abs(np.asarray(a) - b).max()
    for a, b in zip(jax.tree.leaves(one_device.new_state.trainable), jax.tree.leaves(host_params()), strict=True)
  ]
  assert min(moved) > 1e-4, "the update must move every weight matrix"
  for a, b in zip(*(jax.tree.leaves(r.new_state._replace(key=0)) for r in (one_device, other)), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)
  for a, b in zip(*(jax.tree.leaves(r.metrics) for r in (one_device, other)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert int(other.new_state.step) == 2


def test_each_device_holds_its_part(other):
  _, fsdp, tensor, _ = (other.world.mesh.shape[axis] for axis in MESH_AXES)
  expected = {
    "embedding": (16 // tensor, 16 // fsdp),
    "head": (16 // fsdp, 16 // tensor),
    "query": (2, 16 // fsdp, 16 // tensor),
    "out": (2, 16 // tensor, 16 // fsdp),
    "up": (2, 16 // fsdp, 32 // tensor),
    "down": (2, 32 // tensor, 16 // fsdp),
  }
  new = other.new_state
  adam = [new.opt_state[1][0].mu, new.opt_state[1][0].nu]
  for tree in (new.trainable, *adam):
    found = {
      path[-1].key: {s.data.shape for s in leaf.addressable_shards}
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for name, shape in expected.items():
      assert found[name] == {shape}, name
  rows = ROWS // (other.world.mesh.shape["data"] * fsdp)
  assert {s.data.shape for s in other.world.batch()[0].addressable_shards} == {(rows, 8)}


def test_the_state_is_donated(one_device, other):
  for found in (one_device, other):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(found.old_state))
    weights = jax.tree.leaves((found.new_state.trainable, found.new_state.opt_state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in weights)
    assert found.alias_bytes >= held


@pytest.mark.slow(reason="compiles programs of its own")
def test_devices_that_share_positions_hold_no_canvas_whole():
  """Activations of an update, products included, are cut along their length."""
  world = World(mesh_of(1, 2, 1, 4))
  program, _ = world.compile_update(jax.device_get(world.rollout()), world.fresh_state())
  rows, length = ROWS // 2 // UPDATE.accumulation, 16
  inner = set(re.findall(rf"f32\[{rows},(\d+),{SIZE.mlp}\]", program.as_text()))
  assert inner == {str(length // 4)}
  assert not re.search(rf"f32\[{rows * length},{SIZE.mlp}\]", program.as_text())
