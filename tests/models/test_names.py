import json

import jax
import pytest

from d1jax.models import names, transformer
from d1jax.models.families import FAMILIES, PRESETS, llada, llama, qwen2
from tests.models import folders

REAL = [("llada8b", "llada_8b", llada.NAMES, 291), ("dream7b", "dream_7b", qwen2.NAMES, 339)]


def parameters_of(size):
  """Each parameter's place and shape."""
  shapes = jax.eval_shape(transformer.build(size).init, jax.random.key(0))
  return {tuple(entry.key for entry in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def tensors_of(size, scheme):
  """(tensor, its parameter's place, layer, shape as stored) of each tensor that a network is read from."""
  for path, shape in parameters_of(size).items():
    for layer, tensor in enumerate(names.tensors_of(path, scheme[path], size.layers)):
      stored = shape[path[0] == "blocks" :]
      yield tensor, path, layer, stored[::-1] if names.is_transposed(path) else stored


@pytest.mark.parametrize(("folder", "preset", "scheme", "count"), REAL, ids=["llada", "dream"])
def test_the_real_names_are_those_of_the_presets_one_to_one(folder, preset, scheme, count):
  index = json.loads((folders.hub() / folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
  found = [tensor for tensor, *_ in tensors_of(PRESETS[preset], scheme)]
  assert len(found) == len(set(found)) == count
  assert set(found) == set(index["weight_map"])
  assert FAMILIES[preset.partition("_")[0]].scheme_of(index["weight_map"].keys()) is scheme


@pytest.mark.parametrize(("folder", "preset", "scheme", "count"), REAL, ids=["llada", "dream"])
def test_every_layer_of_every_place_is_named_once_and_in_order(folder, preset, scheme, count):
  size, seen = PRESETS[preset], {}
  for tensor, path, layer, _ in tensors_of(size, scheme):
    seen.setdefault(path, []).append(tensor)
    if path[0] == "blocks":
      assert [int(word) for word in tensor.split(".") if word.isdigit()] == [layer], tensor
    else:
      assert not any(word.isdigit() for word in tensor.split("."))
  assert all(len(tensors) == (size.layers if path[0] == "blocks" else 1) for path, tensors in seen.items())
  assert seen.keys() <= scheme.keys()


LLADA_8B = dict(vocab=126464, embed=4096, heads=32, kv_heads=32, head_size=128, mlp=12288, layers=32)
DREAM_7B = dict(vocab=152064, embed=3584, heads=28, kv_heads=4, head_size=128, mlp=18944, layers=28)


@pytest.mark.parametrize(
  ("preset", "scheme", "real_sizes", "biases"),
  [("llada_8b", "llada", LLADA_8B, False), ("dream_7b", "dream", DREAM_7B, True)],
)
def test_stored_shapes_are_those_of_pytorch(preset, scheme, real_sizes, biases):
  expected = folders.shapes_of(scheme, real_sizes)
  found = {t: s for t, _, _, s in tensors_of(PRESETS[preset], llada.NAMES if scheme == "llada" else qwen2.NAMES)}
  assert found == expected
  assert any(name.endswith(".bias") for name in found) == biases


def test_qwen3_is_stored_as_pytorch_stores_it():
  """Of Qwen3-8B, which has as many tensors as SDAR-8B."""
  sizes = dict(vocab=151936, embed=4096, heads=32, kv_heads=8, head_size=128, mlp=12288, layers=36)
  config = folders.CONFIGS["qwen3"](sizes, "bfloat16")
  size = FAMILIES["qwen3"].size(config)
  found = {tensor: shape for tensor, _, _, shape in tensors_of(size, FAMILIES["qwen3"].schemes[0])}
  assert found == folders.shapes_of("qwen3", sizes)
  assert len(found) == 399
  assert transformer.parameter_count(transformer.build(size)) == 8_190_735_360


@pytest.mark.parametrize("family", folders.FAMILIES)
def test_the_scheme_is_told_by_the_tensors(family):
  """LLaDA's folders may have Llama's names."""
  tensors = folders.shapes_of(family, folders.SIZES[family])
  config = folders.CONFIGS[family](folders.SIZES[family], "float32")
  kind = FAMILIES[config["model_type"].lower()]
  assert kind.scheme_of(tensors) is kind.schemes[family == "llada_llama_names"]
  assert kind.scheme_of(()) is kind.schemes[0]


def test_ff_out_is_a_down_projection_inside_the_blocks_and_the_head_outside():
  down, head = llada.NAMES[("blocks", "mlp", "down")], llada.NAMES[("head",)]
  assert down.rpartition(".blocks.")[2] == "{}.ff_out.weight"
  assert head == "model.transformer.ff_out.weight"
  shapes = {tensor: shape for tensor, _, _, shape in tensors_of(PRESETS["llada_8b"], llada.NAMES)}
  assert shapes[down.format(3)] == (4096, 12288)
  assert shapes[head] == (126464, 4096)


def test_matrices_are_transposed_and_nothing_else():
  for path, shape in parameters_of(PRESETS["dream_7b"]).items():
    is_matrix = len(shape[path[0] == "blocks" :]) == 2
    assert names.is_transposed(path) == (is_matrix and path != ("embedding",)), path


def test_both_schemes_name_the_same_places():
  assert llada.NAMES.keys() == llama.NAMES.keys()
  assert len(set(llama.NAMES.values())) == len(llama.NAMES)
  assert len(set(llada.NAMES.values())) == len(llada.NAMES)
