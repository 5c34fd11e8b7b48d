"""Logits against PyTorch's, on goldens that tests/models/make_goldens.py made with transformers and peft."""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.models import load, lora, peft
from d1jax.models.visibility import BlockCausal
from tests.models import folders, forward
from tests.models.configs import BLOCKS

GOLDENS = Path(__file__).parent / "goldens"
SCALARS = json.loads((GOLDENS / "scalars.json").read_text(encoding="utf-8"))
HUB = Path(os.environ.get("D1JAX_DATA", Path(__file__).parents[2] / "../shared/data")) / "tokenizers"
# How far float32 sums in another order may be: logits are of order 1, and two PyTorch kernels differ by 2e-6.
FLOAT32 = 1e-4
ADAPTERS = {
  "llama_all": "llama",
  "llama_qv": "llama",
  "qwen3_all": "qwen3",
  "llada_d1": "llada",
  "llada_all": "llada",
}
EVERYWHERE = {"attention": {"query", "key", "value", "out"}, "mlp": {"gate", "up", "down"}}
ADAPTED = {
  "llama_all": EVERYWHERE,
  "llama_qv": {"attention": {"query", "value"}},
  "qwen3_all": EVERYWHERE,
  # d1 names Llama's seven projections; peft found four of them in LLaDA, whose others have other names.
  "llada_d1": {"attention": {"query", "key", "value"}, "mlp": {"up"}},
  "llada_all": EVERYWHERE,
}
PLACES = {
  "q_proj": ("attention", "query"),
  "k_proj": ("attention", "key"),
  "v_proj": ("attention", "value"),
  "o_proj": ("attention", "out"),
  "attn_out": ("attention", "out"),
  "gate_proj": ("mlp", "gate"),
  "ff_proj": ("mlp", "gate"),
  "up_proj": ("mlp", "up"),
  "down_proj": ("mlp", "down"),
  "ff_out": ("mlp", "down"),
}


class Golden(NamedTuple):
  tokens: np.ndarray
  valid: np.ndarray
  logits: np.ndarray


def golden_of(name):
  with np.load(GOLDENS / f"{name}.npz") as arrays:
    return Golden(arrays["tokens"], arrays["valid"], arrays["logits"])


def errors(network, params, golden, block=None):
  """|logits - golden| at the valid positions; the golden's padding holds random tokens."""
  rule = None if block is None else BlockCausal(block)
  logits = jax.jit(functools.partial(forward.logits, network, rule=rule))(
    params, jnp.asarray(golden.tokens), jnp.asarray(golden.valid)
  )
  assert logits.dtype == jnp.float32
  return np.abs(np.asarray(logits) - golden.logits)[golden.valid]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Folders by family, written in float32 once; LLaDA's and Dream's in shards, as on the hub."""
  root = tmp_path_factory.mktemp("hub")
  for family in folders.FAMILIES:
    folders.write(root / family, family, shards=3 if family in ("llada", "dream") else 1)
  return root.joinpath


@pytest.mark.few(3, reason="each case compiles programs of its own")
@pytest.mark.parametrize("family", folders.FAMILIES)
def test_float32_logits_are_those_of_transformers(folder_of, family):
  loaded = load.load(folder_of(family), dtype=jnp.float32)
  assert errors(loaded.network, loaded.params, golden_of(family), BLOCKS.get(family)).max() < FLOAT32


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("family", folders.FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_pytorch_is(folder_of, family):
  loaded = load.load(folder_of(family), dtype=jnp.bfloat16)
  ours = errors(loaded.network, loaded.params, golden_of(family), BLOCKS.get(family))
  theirs = SCALARS["torch_bfloat16"][family]
  assert ours.max() <= 1.5 * theirs["max_abs"]
  assert ours.mean() <= 1.5 * theirs["mean_abs"]
  assert ours.mean() > 10 * FLOAT32, "so near that it was not computed in bfloat16"


@pytest.fixture(scope="module")
def base_of(folder_of):
  """The base of each adapter, loaded once."""
  loaded = {family: load.load(folder_of(family), dtype=jnp.float32) for family in set(ADAPTERS.values())}
  return lambda name: loaded[ADAPTERS[name]]


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_those_of_peft(base_of, name):
  base = base_of(name)
  spec, adapter = peft.load(GOLDENS / name, base.network)
  assert (spec.rank, spec.alpha, spec.dropout) == (4, 8.0, 0.0)
  assert {part: set(weights) for part, weights in adapter["blocks"].items()} == ADAPTED[name]
  params = lora.overlay(base.params, adapter)
  golden = golden_of(name)
  assert errors(base.network, params, golden).max() < FLOAT32
  assert errors(base.network, base.params, golden).max() > 1.0, "the adapter is of no account"


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_adapters_are_those_of_peft(base_of, name):
  base = base_of(name)
  _, adapter = peft.load(GOLDENS / name, base.network)
  params = lora.merged(lora.overlay(base.params, adapter))
  assert errors(base.network, params, golden_of(name)).max() < FLOAT32
  for key, probe in SCALARS["merged_probes"][name].items():
    words = key.split(".")
    part, weight = PLACES[words[-2]]
    layer = next(int(word) for word in words if word.isdigit())
    stored = np.asarray(params["blocks"][part][weight][layer])
    assert folders.probe(stored.T) == pytest.approx(probe, abs=1e-4), key  # of 4096 values or more


def test_weights_are_drawn_as_they_were_for_the_goldens():
  drawn = folders.draw("lm_head.weight", (2, 3))
  np.testing.assert_allclose(drawn, [[0.1653307, 0.1921057, 0.6513424], [0.0964192, -0.9279067, -0.1123647]], atol=1e-7)
  assert not np.array_equal(drawn, folders.draw("lm_head.weight", (2, 3), seed=1))


@pytest.mark.parametrize(("family", "hub", "layers"), [("llada", "llada8b", 32), ("dream", "dream7b", 28)])
def test_small_folders_have_the_names_of_the_real_ones(folder_of, family, hub, layers):
  if not (HUB / hub).is_dir():
    pytest.skip(f"no folder {hub} in {HUB}; set D1JAX_DATA to the data folder (see its README)")
  real = json.loads((HUB / hub / "model.safetensors.index.json").read_text(encoding="utf-8"))
  assert set(folders.shapes_of(family, folders.SIZES[family] | {"layers": layers})) == set(real["weight_map"])
  small = json.loads((folder_of(family) / "model.safetensors.index.json").read_text(encoding="utf-8"))
  assert set(small) == set(real)
  configs = [json.loads((root / "config.json").read_text()) for root in (HUB / hub, folder_of(family))]
  assert set(configs[0]) == set(configs[1])
