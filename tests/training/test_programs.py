import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from d1jax.aot import hlo
from d1jax.aot.collectives import find
from d1jax.run import experiment as experiments
from d1jax.training import configured
from tests import jobs
from tests.aot import programs as programs_for_tpus

TENSOR = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "adapter"), ("fsdp", "tensor"))
ROLLOUTS = {"batch": "data", "embed": None, **TENSOR}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
EMBED, WIDTH, COMPLETION, WINDOW = 4096, 200, 256, 32


def build(config, devices=None, **fields):
  """Programs of a configuration with some fields changed."""
  with config.unlocked():
    config.rollout_rules = fields.pop("rollout_rules", ROLLOUTS)
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
  experiment = experiments.build(config, None, devices)
  return experiment, configured.programs(experiment, experiment.optimizer(config.grpo, 1))


def large(devices=None, **fields):
  """The 8B preset at d1's batch with its width and vocabulary, one thin layer, and rollouts cut over four devices."""
  narrow = {"heads": 32, "mlp": 512, "layers": 1}
  sizes = {f"model.overrides.{name}": size for name, size in narrow.items()}
  return build(jobs.load("grpo", "llada_8b"), devices, **sizes, model__quantize="none", **MESH, **fields)


class Sent(NamedTuple):
  """A collective: its kind, the numbers in its largest result, how often it runs, and whether in a loop."""

  kind: str
  numbers: int
  times: float
  in_loop: bool


def collectives(compiled) -> list[Sent]:
  found = find(hlo.parse(compiled.as_text()), 8)
  return [Sent(c.kind, max(math.prod(shape.dims) for shape in c.shapes), c.times, c.in_loop) for c in found]


def weights_sent(experiment, compiled) -> list[Sent]:
  """Of weights, in a loop or, where XLA moves them out of one, before it."""
  sizes = weight_sizes(experiment)
  return [c for c in collectives(compiled) if c.kind != "all-reduce" and c.numbers in sizes]


def weight_sizes(experiment) -> set[int]:
  """Numbers of a weight, of all layers or of one, whole or in the parts that an update's devices have."""
  sizes = set()
  for x in jax.tree.leaves(experiment.model.weights.abstract_frozen().base):
    if len(x.shape) > 1:
      sizes |= {math.prod(x.shape) // cut for cut in (1, 2, 4, 8)}
  return sizes


def assert_only_activations_are_sent(experiment, compiled, cache):
  sent = [c for c in collectives(compiled) if c.in_loop]
  rows = 96 // 2 // 2  # of a chunk on a device
  canvas, window = rows * (WIDTH + COMPLETION) * EMBED, rows * WINDOW * EMBED
  assert not weights_sent(experiment, compiled)
  largest = {c.numbers for c in sent if c.numbers >= window}
  assert largest == ({canvas} if cache == "none" else {canvas, window})
  assert {c.kind for c in sent if c.numbers >= window} == {"all-reduce"}
  steps, blocks = 128, 8
  # The embedding, and behind attention and MLP of the layer: three times a pass.
  assert sum(c.times for c in sent if c.numbers == canvas) == 3 * (steps if cache == "none" else blocks)
  assert sum(c.times for c in sent if c.numbers == window) == (0 if cache == "none" else 3 * (steps - blocks))


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_rollouts_send_activations_and_no_weights(cache):
  """On CPU devices; compiled for TPUs below, and at small width in tests/aot/test_command.py."""
  experiment, programs = large(rollout__cache=cache, model__overrides__embed=EMBED)
  assert_only_activations_are_sent(experiment, programs.tracing(WIDTH)["rollout"]().lower().compile(), cache)


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_rules_of_updates_would_send_weights():
  experiment, programs = large(rollout_rules={}, model__overrides__embed=EMBED)
  assert weights_sent(experiment, programs.tracing(WIDTH)["rollout"]().lower().compile())


def small(folder, **fields):
  changes = {"model__overrides__heads": 4, "grpo__rollout_chunks": 2, "grpo__loss__beta": 0.01}
  return build(jobs.small(folder, **changes), **fields)


def iterate(experiment, programs, cached=True):
  """One iteration: completions of a batch of prompts, and the weights that an update makes of them."""
  programs.compile()
  weights = experiment.model.weights
  state = weights.state_from(weights.start(), experiment.optimizer(experiment.config.grpo, 1))
  frozen = weights.frozen if weights.lora else weights.frozen._replace(reference=weights.start())
  rng = np.random.default_rng(0)
  ids = np.arange(16, dtype=np.int32)
  prompt = rng.integers(4, 9, (16, 33)).astype(np.int32)
  arrays = (prompt, np.ones_like(prompt, bool), ids, ids // 4)
  chunks = [
    jax.device_put(tuple(x[half] for x in arrays), experiment.model.rollout_by_row) for half in np.split(ids, 2)
  ]
  params = programs.publish(state, frozen)
  iteration = jax.device_put(np.int32(3), experiment.model.replicated)
  rollout = programs.rollout(params, chunks, state.key, iteration, cached=cached)
  figures = programs.drift(params, rollout[0], rollout[0]) if programs.watch else {}
  host = jax.device_get(rollout)
  state, _, _ = programs.update(state, frozen, rollout, rng.normal(size=16).astype(np.float32))
  return host, jax.device_get(state.trainable), jax.device_get(figures)


@pytest.mark.slow(reason="the TPU's compiler takes minutes for a network of LLaDA's width")
@pytest.mark.long
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_rollouts_on_tpus_send_activations_and_no_weights(cache):
  experiment, programs = large(
    programs_for_tpus.devices("v5e:2x4"), rollout__cache=cache, model__overrides__embed=EMBED
  )
  assert_only_activations_are_sent(experiment, programs.tracing(WIDTH)["rollout"]().lower().compile(), cache)


CACHED = {"rollout__cache": "dual", "rollout__diffusion_steps": 6}


@pytest.mark.slow(reason="compiles rollouts and updates, twice each")
@pytest.mark.parametrize(
  "fields",
  [CACHED | {"lora__rank": 4, "model__overrides__embed": 64}, pytest.param(CACHED, marks=pytest.mark.long)],
  ids=["adapters", "every weight"],
)
def test_rules_of_rollouts_change_no_completion_and_no_update(tmp_path, fields):
  one, other = (
    iterate(*small(tmp_path, rollout_rules=rules, **MESH, **fields)) for rules in ({}, {**ROLLOUTS, "batch": "data"})
  )
  for a, b in zip(one[0], other[0], strict=True):
    assert len({row.tobytes() for row in a.completion}) == 8
    for name in a._fields:
      if name != "reveal_logp":
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.reveal_logp, b.reveal_logp, rtol=0, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), one[1], other[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), one[2], other[2])
  assert one[2], "the drift is looked at"


@pytest.mark.slow(reason="compiles programs of its own")
def test_grouped_heads_roll_out_where_the_mesh_divides_them():
  """Dream's four key-value heads over four devices."""
  config = jobs.load("grpo", "llada_8b")
  config.model.size = "dream_7b"
  fields = {"model.overrides.mlp": 512, "model.overrides.layers": 1, "model.quantize": "none", **MESH}
  _, programs = build(config, **fields)
  compiled = programs.tracing(WIDTH)["rollout"]().lower().compile()
  canvas = 24 * (WIDTH + COMPLETION) * 3584
  sent = collectives(compiled)
  assert max(c.numbers for c in sent) == canvas
  assert {c.kind for c in sent if c.numbers == canvas} == {"all-reduce"}
  with pytest.raises(ValueError, match="rollout_rules cut heads over 8 devices, but the network has 28"):
    build(config, **fields | {"mesh.data": 1, "mesh.tensor": 4})


def test_rows_that_rollouts_cannot_share_are_refused(tmp_path):
  message = r"16 completions in grpo.rollout_chunks=2 does not divide over the 16 devices"
  config = jobs.small(tmp_path)
  devices = [jax.devices()[0]] * 16
  with pytest.raises(ValueError, match=message):
    build(config, devices, rollout_rules={"batch": ("data", "fsdp")}, **{"mesh.data": 16})
