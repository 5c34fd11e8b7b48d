"""What it takes to add a family: its file, here the first part of this one, and nothing else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d1jax.model import build_denoiser
from d1jax.models import families, load, lora, peft, save
from d1jax.models.families import FAMILIES, llama
from d1jax.models.family import Family, positive, sizes
from d1jax.models.layers import SelfAttention
from tests.models import folders

# The file of a made-up family: its keys, its names, and a layer that no other family has.


class Softened(SelfAttention):
  """Attention whose queries and keys are bounded."""

  def before_rotary(self, name, heads):
    """The heads, between -1 and 1."""
    return jnp.tanh(heads)


KEYS = {"vocab": ("words",), "embed": ("width",), "heads": ("heads",), "mlp": ("inner",), "layers": ("depth",)}
NAMES = {
  path: name.replace("model.layers.", "net.h.").replace("self_attn.", "").replace("down_proj", "head")
  for path, name in llama.NAMES.items()
} | {("embedding",): "net.table.weight", ("head",): "net.head.weight", ("final_norm", "scale"): "net.norm.weight"}
FAMILY = Family(
  model_type="made_up",
  shift=0,
  read=lambda c: sizes(c, KEYS, rope_theta=positive(c, "base"), tied=False, attention_layer=Softened),
  size_keys=KEYS,
  tied_key="tied",
  schemes=(NAMES,),
  defaults={"base": 100.0},
  fixed={"act": "silu"},
)

# Its end.

CONFIG = {"model_type": "Made_Up", "words": 40, "width": 64, "heads": 4, "inner": 128, "depth": 2}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)), jnp.int32)
VALID = jnp.asarray(np.arange(8)[None] >= np.asarray([0, 3])[:, None])


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder of the made-up family."""
  monkeypatch.setitem(FAMILIES, "made_up", FAMILY)
  shapes = folders.llama_shapes(dict(vocab=40, embed=64, heads=4, kv_heads=4, head_size=16, mlp=128, layers=2))
  renamed = {}
  for path, name in llama.NAMES.items():
    for layer in range(2 if path[0] == "blocks" else 1):
      renamed[NAMES[path].format(layer)] = folders.draw(name.format(layer), shapes[name.format(layer)])
  source = tmp_path / "source"
  source.mkdir()
  save_file(renamed, source / "model.safetensors")
  (source / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
  return source


def test_every_file_of_the_folder_is_a_family_and_no_two_are_the_same():
  found = {path.stem for path in families.Path(families.__file__).parent.glob("*.py")} - {"__init__"}
  assert found == {model_type.replace("-", "_") for model_type in FAMILIES}
  presets = [name for family in FAMILIES.values() for name in family.presets]
  assert len(presets) == len(set(presets)) == len(families.PRESETS)


def test_a_family_is_one_file(folder, tmp_path):
  """It is read, written, adapted, and its adapters go through PEFT's folders."""
  loaded = load.load(folder, jnp.float32)
  assert (loaded.description.family, loaded.description.shift) == (FAMILY, 0)
  assert loaded.network.size.attention_layer is Softened
  save.export(tmp_path / "out", loaded.params, loaded.network.size, source=folder, token_ids={})
  found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
  assert found.keys() == expected.keys()
  assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)

  spec = lora.LoraSpec(2, 4.0, targets=("q_proj", "down_proj"))
  adapter = lora.init(jax.random.key(0), spec, loaded.params)
  peft.save(tmp_path / "adapter", adapter, spec, base="", scheme=NAMES)
  config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text(encoding="utf-8"))
  assert config["target_modules"] == r".*\.h\.\d+\.(q_proj|mlp\.head)", "the head has the last name of a projection"
  again, tree = peft.load(tmp_path / "adapter", loaded.network)
  assert again == spec
  jax.tree.map(np.testing.assert_array_equal, tree, adapter)


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_layer_of_a_family_is_its_own(folder):
  loaded = load.load(folder, jnp.float32)
  plain = load.transformer.build(dataclasses.replace(loaded.network.size, attention_layer=SelfAttention))
  found, other = (jax.jit(n.encode)(loaded.params, TOKENS, VALID) for n in (loaded.network, plain))
  assert np.isfinite(found).all()
  assert np.abs(np.asarray(found - other)).mean() > 0.01


@pytest.mark.slow(reason="compiles programs of its own")
def test_another_mask_is_a_rule_that_its_denoiser_passes_on(folder):
  """With `block`, a position's block and all before it are seen: the one thing that other rooms are told."""
  loaded = load.load(folder, jnp.float32)
  denoiser = build_denoiser(loaded.network, mask_id=39, stop_ids=(), known_ids=40, block=4)
  encode = jax.jit(denoiser.encode)
  before, after = (encode(loaded.params, tokens, VALID) for tokens in (TOKENS, TOKENS.at[:, 4].add(1) % 40))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(np.asarray(before - after))[:, 4:].max(-1) > 1e-4).all()
