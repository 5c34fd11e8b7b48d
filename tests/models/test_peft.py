import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from d1jax.models import families, lora, peft, transformer
from d1jax.models.families import llada, llama
from d1jax.models.lora import PROJECTIONS, LoraSpec
from tests.models import folders

GOLDENS = Path(__file__).parent / "goldens"
ADAPTERS = {
  "llama_all": "llama",
  "llama_qv": "llama",
  "qwen3_all": "qwen3",
  "llada_d1": "llada",
  "llada_all": "llada",
}
LLADA_Q = "base_model.model.model.transformer.blocks.1.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
  """The networks of the small folders."""
  found = {}
  for family in ("llama", "qwen3", "llada"):
    folder = tmp_path_factory.mktemp(family)
    config = folders.CONFIGS[family](folders.SIZES[family], "float32")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found[family] = transformer.build(families.describe(folder).size)
  return found


@pytest.fixture
def copied(tmp_path):
  """A golden adapter folder to damage: options and tensors changed, `...` takes one away."""

  def make(name="llada_all", options=None, **tensors):
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / peft.CONFIG).read_text(encoding="utf-8")) | (options or {})
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / peft.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    if tensors:
      held = {key: value for key, value in (load_file(folder / peft.WEIGHTS) | tensors).items() if value is not ...}
      save_file(held, folder / peft.WEIGHTS)
    return folder

  return make


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_round_trip_keeps_every_name_and_bit(tmp_path, networks, name):
  spec, adapter = peft.load(GOLDENS / name, networks[ADAPTERS[name]])
  scheme = llada.NAMES if ADAPTERS[name] == "llada" else llama.NAMES
  peft.save(tmp_path / "out", adapter, spec, base="somewhere", scheme=scheme)
  found, expected = load_file(tmp_path / "out" / peft.WEIGHTS), load_file(GOLDENS / name / peft.WEIGHTS)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key
    assert found[key].tobytes() == value.tobytes(), key
  with safe_open(tmp_path / "out" / peft.WEIGHTS, "numpy") as file:
    assert file.metadata() == {"format": "pt"}
  written = json.loads((tmp_path / "out" / peft.CONFIG).read_text(encoding="utf-8"))
  golden = json.loads((GOLDENS / name / peft.CONFIG).read_text(encoding="utf-8"))
  same = set(peft.FIXED) | {"use_rslora", "r", "lora_alpha", "lora_dropout", "inference_mode", "task_type"}
  assert {key: written[key] for key in same} == {key: golden[key] for key in same}
  assert written["base_model_name_or_path"] == "somewhere"
  assert written.keys() <= golden.keys(), "an option that peft does not know"
  again, tree = peft.load(tmp_path / "out", networks[ADAPTERS[name]])
  assert again == spec
  assert jax.tree.structure(tree) == jax.tree.structure(adapter)
  jax.tree.map(np.testing.assert_array_equal, tree, adapter)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_modules_that_peft_would_adapt_are_those_of_the_tensors(tmp_path, networks, name):
  """peft compares a list with a module's last name, and a pattern with its whole name."""
  family = ADAPTERS[name]
  spec, adapter = peft.load(GOLDENS / name, networks[family])
  scheme = llada.NAMES if family == "llada" else llama.NAMES
  peft.save(tmp_path / "out", adapter, spec, base="", scheme=scheme)
  targets = json.loads((tmp_path / "out" / peft.CONFIG).read_text(encoding="utf-8"))["target_modules"]
  modules = [t.removesuffix(".weight") for t in folders.shapes_of(family, folders.SIZES[family])]
  if isinstance(targets, str):
    matched = {module for module in modules if re.fullmatch(targets, module)}
  else:
    matched = {module for module in modules if module.rpartition(".")[2] in targets}
  held = load_file(GOLDENS / name / peft.WEIGHTS)
  assert matched == {key.removeprefix(peft.PREFIX).rpartition(".lora_")[0] for key in held}


def test_the_targets_are_what_the_tensors_have_not_what_the_configuration_asks_for(networks):
  """d1 asks for Llama's seven names; peft found four of them in LLaDA and said nothing."""
  asked = json.loads((GOLDENS / "llada_d1" / peft.CONFIG).read_text(encoding="utf-8"))["target_modules"]
  assert len(asked) == 7
  spec, adapter = peft.load(GOLDENS / "llada_d1", networks["llada"])
  assert spec == LoraSpec(4, 8.0, 0.0, ("q_proj", "k_proj", "v_proj", "up_proj"))
  assert set(adapter["blocks"]["attention"]) == {"query", "key", "value"}
  assert set(adapter["blocks"]["mlp"]) == {"up"}
  assert peft.load(GOLDENS / "llada_all", networks["llada"])[0].targets == tuple(PROJECTIONS)


def test_rank_stabilised_adapters_go_both_ways(tmp_path, networks, copied):
  """PEFT's scale is alpha / sqrt(r) then."""
  spec, adapter = peft.load(copied("llama_qv", {"use_rslora": True}), networks["llama"])
  assert spec.rslora
  assert (
    {leaf.scale for leaf in adapter["blocks"]["attention"].values()} == {spec.alpha / spec.rank**0.5} == {spec.scale}
  )
  peft.save(tmp_path / "out", adapter, spec, base="", scheme=llama.NAMES)
  assert json.loads((tmp_path / "out" / peft.CONFIG).read_text(encoding="utf-8"))["use_rslora"] is True
  assert peft.load(tmp_path / "out", networks["llama"])[0] == spec
  with pytest.raises(ValueError, match="use_rslora='yes' is neither true nor false"):
    peft.load(copied("llama_qv", {"use_rslora": "yes"}), networks["llama"])


def test_every_layer_stands_in_its_place(networks):
  _, adapter = peft.load(GOLDENS / "llada_all", networks["llada"])
  held = load_file(GOLDENS / "llada_all" / peft.WEIGHTS)
  down = adapter["blocks"]["mlp"]["down"]
  for layer in range(2):
    module = f"base_model.model.model.transformer.blocks.{layer}.ff_out"
    np.testing.assert_array_equal(down.a[layer], held[f"{module}.lora_A.weight"].T)
    np.testing.assert_array_equal(down.b[layer], held[f"{module}.lora_B.weight"].T)
  assert (down.scale, down.dropout) == (2.0, 0.0)
  assert down.a.dtype == down.b.dtype == jnp.float32


def test_the_tree_is_that_of_a_fresh_adapter(networks, copied):
  """The same structure, static parts included, so that it can take its place in a state; dropout is read."""
  spec, adapter = peft.load(copied(options={"lora_dropout": 0.05, "r": 4, "lora_alpha": 16}), networks["llada"])
  assert spec == LoraSpec(4, 16.0, 0.05)
  shapes = jax.eval_shape(networks["llada"].init, jax.random.key(0))
  fresh = jax.eval_shape(lambda key: lora.init(key, spec, shapes), jax.random.key(0))
  assert jax.tree.structure(adapter) == jax.tree.structure(fresh)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), adapter) == jax.tree.map(lambda a: (a.shape, a.dtype), fresh)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_half_precision_adapters_are_read_as_float32(networks, copied, dtype):
  kind = folders.DTYPES["bfloat16"] if dtype == "bfloat16" else np.dtype(dtype)
  held = {key: value.astype(kind) for key, value in load_file(GOLDENS / "llama_qv" / peft.WEIGHTS).items()}
  _, adapter = peft.load(copied("llama_qv", **held), networks["llama"])
  key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
  found = adapter["blocks"]["attention"]["value"].b
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found[1], held[key].astype(np.float32).T)


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("use_dora", True),
    ("rank_pattern", {"q_proj": 8}),
    ("alpha_pattern", {"q_proj": 8}),
    ("bias", "lora_only"),
    ("bias", "all"),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("layers_to_transform", [0]),
    ("layers_to_transform", 0),
    ("layer_replication", [[0, 2]]),
    ("trainable_token_indices", [1, 2]),
    ("fan_in_fan_out", True),
    ("peft_type", "LOHA"),
    ("peft_type", None),
    ("bias", None),
    ("target_parameters", ["a.b"]),
    ("use_qalora", True),
    ("use_bdlora", {"n": 1}),
    ("alora_invocation_tokens", [7]),
    ("arrow_config", {"top_k": 1}),
    ("kasa_config", {"beta": 1}),
    ("monteclora_config", {"n": 1}),
    ("velora_config", {"n": 1}),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"),
  ],
)
def test_an_option_that_is_not_supported_is_named(networks, copied, option, value):
  folder = copied(options={option: value})
  with pytest.raises(ValueError, match=rf"adapter_config\.json: {option}=") as caught:
    peft.load(folder, networks["llada"])
  assert repr(value) in str(caught.value)
  assert str(folder) in str(caught.value)


def test_options_that_may_be_left_out_or_null(networks, copied):
  """An old folder, with the options that peft had in 2023."""
  old = dict.fromkeys({**peft.FIXED, **peft.OTHERS}, ...) | {"init_lora_weights": ..., "lora_dropout": ...}
  spec, _ = peft.load(copied(options=old), networks["llada"])
  assert spec == LoraSpec(4, 8.0)
  nulls = {"rank_pattern": None, "use_dora": None, "fan_in_fan_out": None, "init_lora_weights": "gaussian"}
  assert peft.load(copied(options=nulls), networks["llada"])[0] == spec


@pytest.mark.parametrize(
  "options", [{"r": ...}, {"lora_alpha": ...}, {"r": "four"}, {"r": None}, {"r": 0}, {"r": [4]}, {"lora_alpha": 0}]
)
def test_a_configuration_without_rank_or_alpha_is_named(networks, copied, options):
  with pytest.raises(ValueError, match=r"adapter_config\.json is not the configuration of a LoRA adapter"):
    peft.load(copied(options=options), networks["llada"])


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"[]", "is not an object"),
    (b"null", "is not an object"),
    (b"3", "is not an object"),
    (b"\xff", "is not UTF-8"),
    (b"[" * 100_000, "is nested too deep"),
    (b'{"r": 4, "lora_alpha": 1' + b"0" * 400 + b"}", "holds a number of 401 digits"),
  ],
  ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_configuration_is_named(networks, copied, content, reason):
  folder = copied()
  (folder / peft.CONFIG).write_bytes(content)
  with pytest.raises(ValueError, match=rf"adapter_config\.json {reason}.*; point to the folder of a LoRA adapter"):
    peft.load(folder, networks["llada"])


def test_a_byte_order_mark_is_read(networks, copied):
  folder = copied()
  path = folder / peft.CONFIG
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert peft.load(folder, networks["llada"])[0] == LoraSpec(4, 8.0)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"r": float("inf")}, "r=inf is not a whole number"),
    ({"r": 4.0}, "r=4.0 is not a whole number"),
    ({"r": True}, "r=True is not a whole number"),
    ({"r": 10**30}, r"has shape \(4, 64\), expected \(10{30}, 64\)"),
    ({"lora_alpha": float("inf")}, "lora_alpha=inf is not a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a number"),
    ({"lora_alpha": "8"}, "lora_alpha='8' is not a number"),
    ({"lora_alpha": 1e19}, r"lora_alpha=1e\+19 is more than 1e\+06 times r=4; correct it"),
    ({"lora_alpha": 10**30}, r"lora_alpha=1e\+30 is more than 1e\+06 times r=4"),
    ({"lora_dropout": float("nan")}, "lora_dropout=nan is not a number"),
    ({"lora_dropout": None}, "lora_dropout=None is not a number"),
  ],
  ids=str,
)
def test_numbers_that_cannot_be_are_named(networks, copied, options, named):
  with pytest.raises(ValueError, match=named):
    peft.load(copied(options=options), networks["llada"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_is_refused(networks, copied, value):
  a = load_file(GOLDENS / "llada_all" / peft.WEIGHTS)[LLADA_Q]
  a[1, 2] = value
  with pytest.raises(ValueError, match=f"tensor {LLADA_Q} holds NaN or infinity"):
    peft.load(copied(**{LLADA_Q: a}), networks["llada"])


@pytest.mark.parametrize(
  ("prefix", "suffix"), [("", ".weight"), ("base_model.", ".weight"), ("module.", ".weight"), (None, ".default.weight")]
)
def test_adapters_under_other_names_are_told_the_expected_ones(networks, copied, prefix, suffix):
  """As other trainers and older versions of PEFT write them."""
  held = load_file(GOLDENS / "llama_qv" / peft.WEIGHTS)
  rename = lambda key: (key if prefix is None else prefix + key.removeprefix(peft.PREFIX)).replace(".weight", suffix)
  folder = copied("llama_qv", **dict.fromkeys(held, ...), **{rename(key): value for key, value in held.items()})
  first = min(map(rename, held))
  expected = "base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight"
  with pytest.raises(ValueError, match=re.escape(f"{first} belongs to no projection of the network")) as caught:
    peft.load(folder, networks["llama"])
  assert f"expected names are such as {expected}, with N from 0 to 1" in str(caught.value)


@pytest.mark.parametrize("file", [peft.CONFIG, peft.WEIGHTS])
def test_a_missing_file_is_named(networks, copied, file):
  folder = copied()
  (folder / file).unlink()
  with pytest.raises(ValueError, match=file):
    peft.load(folder, networks["llada"])


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_missing_tensor_is_named(networks, copied, side, layer):
  name = LLADA_Q.replace("blocks.1", f"blocks.{layer}").replace("lora_A", f"lora_{side}")
  with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {name} has shape no tensor"):
    peft.load(copied(**{name: ...}), networks["llada"])


@pytest.mark.parametrize("shape", [(4, 63), (64, 4), (5, 64), (4,)])
def test_a_misshaped_tensor_is_named(networks, copied, shape):
  with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight has shape .*expected \(4, 64\)") as caught:
    peft.load(copied(**{LLADA_Q: np.zeros(shape, np.float32)}), networks["llada"])
  assert str(shape) in str(caught.value)


def test_a_rank_that_the_tensors_do_not_have_is_named(networks, copied):
  with pytest.raises(ValueError, match=r"has shape \(4, 64\), expected \(8, 64\)"):
    peft.load(copied(options={"r": 8}), networks["llada"])


@pytest.mark.parametrize(
  "name",
  [
    "base_model.model.model.transformer.blocks.2.q_proj.lora_A.weight",
    "base_model.model.model.transformer.ff_out.lora_A.weight",
    "base_model.model.model.transformer.blocks.0.q_proj.lora_magnitude_vector",
    "base_model.model.lm_head.weight",
  ],
)
def test_an_unknown_tensor_is_named(networks, copied, name):
  with pytest.raises(ValueError, match="belongs to no projection of the network") as caught:
    peft.load(copied(**{name: np.zeros((4, 64), np.float32)}), networks["llada"])
  assert name in str(caught.value)


def test_an_adapter_of_another_network_is_refused(networks):
  with pytest.raises(ValueError, match=r"k_proj\.lora_B\.weight has shape \(32, 4\), expected \(64, 4\)"):
    peft.load(GOLDENS / "llama_all", networks["llada"])  # grouped heads: k and v are narrower


def test_a_folder_without_tensors_is_refused(networks, copied):
  folder = copied()
  save_file({}, folder / peft.WEIGHTS)
  with pytest.raises(ValueError, match=r"adapter_model\.safetensors holds no tensors of an adapter"):
    peft.load(folder, networks["llada"])


def test_a_truncated_file_is_named(networks, copied):
  folder = copied()
  path = folder / peft.WEIGHTS
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ValueError, match="truncated"):
    peft.load(folder, networks["llada"])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_adapter_has_the_permissions_of_new_files(tmp_path, networks, umask):
  spec, adapter = peft.load(GOLDENS / "llama_qv", networks["llama"])
  before = os.umask(umask)
  try:
    peft.save(tmp_path / "out", adapter, spec, base="", scheme=llama.NAMES)
  finally:
    os.umask(before)
  assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, networks):
  spec, adapter = peft.load(GOLDENS / "llama_qv", networks["llama"])
  (tmp_path / "out").write_text("mine", encoding="utf-8")
  with pytest.raises(ValueError, match="out is a file, expected a folder"):
    peft.save(tmp_path / "out", adapter, spec, base="", scheme=llama.NAMES)
