import dataclasses
import json
import os

import jax
import pytest

from d1jax.models import families, transformer
from d1jax.models.families import PRESETS, describe, llada, with_rows
from d1jax.models.layers import RopeScaling
from d1jax.models.transformer import TransformerSize
from tests.models import folders
from tests.models.configs import BLOCKS

HUB_FAMILIES = ("dream", "qwen2", "llama", "llama_tied")


@pytest.fixture
def folder_of(tmp_path):
  """Makes a folder of a family that has a config.json alone, with some keys changed."""

  def make(family, **changes):
    size = folders.SIZES[family]
    (tmp_path / "config.json").write_text(json.dumps(folders.CONFIGS[family](size, "bfloat16")), encoding="utf-8")
    folders.edit_config(tmp_path, **changes)
    return tmp_path

  return make


@pytest.mark.parametrize("family", folders.FAMILIES)
def test_sizes_of_small_folders(folder_of, family):
  found, s = describe(folder_of(family)), folders.SIZES[family]
  size = found.size
  assert (size.vocab, size.embed, size.heads, size.mlp, size.layers) == tuple(
    s[name] for name in ("vocab", "embed", "heads", "mlp", "layers")
  )
  assert (size.key_value_heads, size.head_size) == (s["kv_heads"], s["head_size"])
  assert size.qkv_bias == (family in folders.BIASED)
  assert size.tied == (family in folders.TIED)
  assert found.shift == (0 if family.startswith(("llada", "a2d_qwen3", "sdar", "illada")) else 1)
  assert found.mask_id == (s["vocab"] - 4 if family in folders.WITH_MASK else None)
  assert found.block == (BLOCKS[family] if family == "fast_dllm_qwen" else None)
  assert found.family.block_causal == (family in BLOCKS)
  assert found.family.masked == (family in ("sdar", "fast_dllm_qwen", "illada"))
  expected = family.removesuffix("_llama_names").removesuffix("_tied").replace("a2d_", "a2d-")
  assert found.family.model_type == expected
  assert found.config == json.loads((folder_of(family) / "config.json").read_text())


@pytest.mark.parametrize(
  ("name", "preset", "family", "shift", "mask_id", "parameters"),
  [
    ("llada8b", "llada_8b", "llada", 0, 126336, 8_015_581_184),
    ("dream7b", "dream_7b", "dream", 1, 151666, 7_615_616_512),
  ],
)
def test_the_real_configurations(name, preset, family, shift, mask_id, parameters):
  found = describe(folders.hub() / name)
  assert (found.family.model_type, found.shift, found.mask_id) == (family, shift, mask_id)
  network = transformer.build(found.size)
  assert transformer.parameter_count(network) == parameters
  assert found.size.head_size == 128
  shapes = lambda size: jax.eval_shape(transformer.build(size).init, jax.random.key(0))
  assert shapes(found.size) == shapes(PRESETS[preset])
  for value in ("rope_theta", "norm_eps", "key_value_heads", "qkv_bias", "tied", "rope_scaling"):
    assert getattr(found.size, value) == getattr(PRESETS[preset], value), value


@pytest.mark.parametrize(
  ("preset", "parameters"),
  [
    ("qwen3_0.6b", 596_049_920),
    ("qwen3_1.7b", 1_720_574_976),
    ("sdar_1.7b", 1_720_574_976 + 151936 * 2048),  # its head is its own, unlike that of Qwen3-1.7B and Qwen3-4B
    ("sdar_4b", 4_022_468_096 + 151936 * 2560),
    ("sdar_8b", 8_190_735_360),
    ("fast_dllm_1.5b", 1_543_714_304),
    ("fast_dllm_7b", 7_615_616_512),
  ],
)
def test_the_parameters_of_presets_are_those_of_the_models_that_they_came_from(preset, parameters):
  assert transformer.parameter_count(transformer.build(PRESETS[preset])) == parameters
  assert PRESETS[preset].head_size == 128


def test_dreams_parameters_by_arithmetic():
  """What the index of Dream-7B says: two bytes a parameter."""
  vocab, embed, mlp, layers, heads, kv_heads, head = 152064, 3584, 18944, 28, 28, 4, 128
  inner, shared = heads * head, kv_heads * head
  layer = 2 * embed * inner + 2 * embed * shared + inner + 2 * shared + 3 * embed * mlp + 2 * embed
  assert layers * layer + 2 * vocab * embed + embed == 7_615_616_512
  index = json.loads((folders.hub() / "dream7b" / "model.safetensors.index.json").read_text(encoding="utf-8"))
  assert index["metadata"]["total_size"] == 2 * 7_615_616_512


LLADA_CHANGES = [
  ("alibi", True),
  ("attention_layer_norm", True),
  ("activation_type", "gelu"),
  ("activation_type", "swiglu"),
  ("activation_type", None),
  ("attention_dropout", 0.1),
  ("residual_dropout", 0.1),
  ("embedding_dropout", 0.1),
  ("include_bias", True),
  ("include_qkv_bias", True),
  ("bias_for_layer_norm", True),
  ("block_type", "sequential"),
  ("block_group_size", 2),
  ("input_emb_norm", True),
  ("layer_norm_type", "default"),
  ("layer_norm_with_affine", False),
  ("multi_query_attention", True),
  ("rope", False),
  ("rope_full_precision", False),
  ("scale_logits", True),
  ("model_type", "mamba"),
  ("model_type", None),
  ("d_model", "64"),
  ("d_model", None),
  ("d_model", 64.5),
  ("d_model", True),
  ("d_model", [64]),
  ("n_heads", 0),
  ("n_heads", "4"),
  ("n_kv_heads", "4"),
  ("n_kv_heads", 0),
  ("n_layers", -2),
  ("n_layers", {"n": 2}),
  ("mlp_hidden_size", "96"),
  ("mlp_ratio", None),
  ("mlp_ratio", 2.5),
  ("embedding_size", "83"),
  ("rope_theta", "500000.0"),
  ("rope_theta", None),
  ("rope_theta", float("nan")),
  ("rms_norm_eps", "1e-05"),
  ("rms_norm_eps", float("inf")),
  ("weight_tying", "false"),
  ("quantization_config", {"load_in_4bit": True}),
]


@pytest.mark.parametrize(("key", "value"), LLADA_CHANGES, ids=str)
def test_what_lladas_configuration_may_not_say(folder_of, key, value):
  mlp = {"mlp_hidden_size": None} if key == "mlp_ratio" else {}
  folder = folder_of("llada", **mlp, **{key: value})
  with pytest.raises(ValueError, match=key) as caught:
    describe(folder)
  assert str(folder / "config.json") in str(caught.value)
  if value is not None and value == value:  # not NaN
    assert repr(value) in str(caught.value), "the value is not named"


HUB_CHANGES = [
  ("hidden_act", "gelu"),
  ("attention_bias", True),
  ("attention_dropout", 0.1),
  ("block_size", 0),
  ("block_size", "4"),
  ("block_size", 4.0),
  ("block_size", True),
  ("mlp_bias", True),
  ("use_sliding_window", True),
  ("use_mrope", True),
  ("partial_rotary_factor", 0.5),
  ("quantization_config", {"load_in_4bit": True}),
  ("layer_types", ["full_attention", "sliding_attention"]),
  ("layer_types", ["chunked_attention"]),
  ("layer_types", "full_attention"),
  ("model_type", "qwen3_moe"),
  ("model_type", "gpt2"),
  ("model_type", ["llama"]),
  ("hidden_size", "64"),
  ("hidden_size", None),
  ("vocab_size", 0),
  ("vocab_size", "72"),
  ("intermediate_size", 96.0),
  ("num_attention_heads", "4"),
  ("num_key_value_heads", "2"),
  ("num_hidden_layers", "2"),
  ("head_dim", "16"),
  ("head_dim", 0),
  ("rms_norm_eps", "1e-6"),
  ("rms_norm_eps", 0),
  ("tie_word_embeddings", "true"),
]


@pytest.mark.parametrize(("key", "value"), HUB_CHANGES, ids=str)
@pytest.mark.parametrize("family", ["dream", "llama"])
def test_what_the_others_configurations_may_not_say(folder_of, family, key, value):
  folder = folder_of(family, **{key: value})
  with pytest.raises(ValueError, match=key) as caught:
    describe(folder)
  assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
  ("family", "key"),
  [("llada", k) for k in ("model_type", "d_model", "n_heads", "n_layers")]
  + [("qwen2", k) for k in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")]
  + [("qwen2", "num_hidden_layers")]
  + [("illada", k) for k in ("rope_theta", "rms_norm_eps", "tie_word_embeddings")],
)
def test_a_missing_key_is_named(folder_of, family, key):
  folder = folder_of(family, **{key: ...})
  with pytest.raises(ValueError, match=f"config.json.*{key}"):
    describe(folder)


@pytest.mark.parametrize(
  ("family", "changes", "expected"),
  [
    ("llama", {"rope_theta": ..., "rope_scaling": ...}, {"rope_theta": 10000.0, "rope_scaling": None}),  # Llama 2
    ("llama", {"rms_norm_eps": ...}, {"norm_eps": 1e-6}),
    ("llama", {"tie_word_embeddings": ...}, {"tied": False}),
    ("llama", {"pretraining_tp": 2}, {}),
    ("llama", {"pretraining_tp": ...}, {}),
    ("llama_tied", {"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 10000.0, "rope_scaling": None}),
    ("qwen2", {"rope_theta": ..., "rms_norm_eps": ...}, {"rope_theta": 10000.0, "norm_eps": 1e-6}),
    ("qwen2", {"tie_word_embeddings": ...}, {"tied": False}),
    ("qwen3", {"head_dim": ..., "rope_theta": ...}, {"head_dim": 128, "rope_theta": 10000.0}),
    ("a2d_qwen3", {"head_dim": ..., "tie_word_embeddings": ...}, {"head_dim": 128, "tied": False}),
    ("sdar", {"head_dim": ..., "rope_theta": ...}, {"head_dim": 128, "rope_theta": 10000.0}),
    ("fast_dllm_qwen", {"rope_theta": ..., "tie_word_embeddings": ...}, {"rope_theta": 10000.0, "tied": False}),
    ("dream", {"rope_theta": ..., "rms_norm_eps": ...}, {"rope_theta": 10000.0, "norm_eps": 1e-6}),
    ("llada", {"rope_theta": ..., "rms_norm_eps": ...}, {"rope_theta": 10000.0, "norm_eps": 1e-5}),
    ("llada", {"mlp_hidden_size": None}, {"mlp": 256}),
    ("llada", {"mlp_hidden_size": ..., "mlp_ratio": ...}, {"mlp": 256}),
    ("llada", {"mlp_hidden_size": None, "mlp_ratio": 2}, {"mlp": 128}),
    ("llada", {"weight_tying": ...}, {"tied": True}),
    ("llada", {"weight_tying": None}, {"tied": False}),
    ("llada", {"quantization_config": None}, {}),
  ],
  ids=str,
)
def test_what_is_not_stated_is_as_the_class_of_the_configuration_has_it(folder_of, family, changes, expected):
  whole = describe(folder_of(family)).size
  assert describe(folder_of(family, **changes)).size == dataclasses.replace(whole, **expected)


def test_a_missing_vocabulary_is_named(folder_of):
  assert describe(folder_of("llada", vocab_size=...)).size.vocab == 83
  assert describe(folder_of("llada", embedding_size=None)).size.vocab == 83
  with pytest.raises(ValueError, match="vocab_size"):
    describe(folder_of("llada", vocab_size=..., embedding_size=...))


def test_embedding_size_goes_before_vocab_size(folder_of):
  assert describe(folder_of("llada", vocab_size=80, embedding_size=96)).size.vocab == 96


def test_what_may_be_null_or_left_out(folder_of):
  whole = describe(folder_of("llada")).size
  nulls = {name: None for name in llada.FIXED if not llada.FIXED[name]}
  assert describe(folder_of("llada", **nulls, n_kv_heads=None)).size == whole
  assert describe(folder_of("llada", **dict.fromkeys(llada.FIXED, ...))).size == whole
  dream = describe(folder_of("dream")).size
  assert describe(folder_of("dream", head_dim=None, layer_types=["full_attention"] * 3)).size == dream
  alone = describe(folder_of("dream", num_key_value_heads=None)).size
  assert alone.key_value_heads == alone.heads == 4


def test_model_types_are_read_in_any_case(folder_of):
  assert describe(folder_of("dream", model_type="dream")).family.model_type == "dream"
  assert describe(folder_of("dream")).config["model_type"] == "Dream"


CLASSIC = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CLASSIC["original_max_position_embeddings"] = 8192


def test_rotary_options_as_transformers_4_and_5_write_them(folder_of):
  expected = RopeScaling(8.0, 1.0, 4.0, 8192)
  for options in (
    {"rope_theta": 2e4, "rope_scaling": CLASSIC},
    {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {**CLASSIC, "rope_theta": 2e4}},
    {"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": {**CLASSIC, "rope_theta": 2e4}},
  ):
    size = describe(folder_of("llama", **options)).size
    assert (size.rope_theta, size.rope_scaling) == (2e4, expected)
  plain = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}}
  size = describe(folder_of("llama", **plain)).size
  assert (size.rope_theta, size.rope_scaling) == (3e4, None)
  old = {"rope_theta": 2e4, "rope_scaling": {k: v for k, v in CLASSIC.items() if k != "rope_type"} | {"type": "llama3"}}
  assert describe(folder_of("llama", **old)).size.rope_scaling == expected


@pytest.mark.parametrize(
  ("scaling", "named"),
  [
    ({"rope_type": "yarn", "factor": 4.0}, "rope_type='yarn'"),
    ({"type": "linear", "factor": 2.0}, "rope_type='linear'"),
    ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
    ({"rope_type": None, "factor": 2.0}, "rope_type=None"),
    ({**CLASSIC, "factor": None}, "factor=None"),
    ({**CLASSIC, "factor": "8"}, "factor='8'"),
    ({**CLASSIC, "high_freq_factor": 1.0}, "low_freq_factor=1.0 is not below high_freq_factor=1.0"),
    ({**CLASSIC, "original_max_position_embeddings": 8192.5}, "original_max_position_embeddings=8192.5"),
    ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "'low_freq_factor' is missing"),
    ({**CLASSIC, "rope_theta": "2e4"}, "rope_theta='2e4'"),
    ("llama3", "='llama3' is not a table"),
    ([8.0], "=.8.0. is not a table"),
  ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_what_rotary_options_may_not_say(folder_of, key, scaling, named):
  folder = folder_of("llama", **{"rope_scaling": None, key: scaling})
  with pytest.raises(ValueError, match=f"config.json.*{named}"):
    describe(folder)


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"\x00", "is not JSON"),
    (b"[]", "is not an object"),
    (b"null", "is not an object"),
    (b'"llada"', "is not an object"),
    (b'[{"model_type": "llada"}]', "is not an object"),
    (b'{"model_type": "\xff\xfe"}', "is not UTF-8"),
    (b"[" * 100_000, "is nested too deep"),
    (b'{"model_type": "llada", "a": ' + b"[" * 100_000, "is nested too deep"),
    (b'{"model_type": "llada", "n_layers": 1' + b"0" * 400 + b"}", "holds a number of 401 digits"),
  ],
  ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, reason):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(ValueError, match=rf"config\.json {reason}.*; point to the folder of a downloaded model"):
    describe(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device"])
def test_what_is_no_regular_file_is_named(tmp_path, kind):
  path = tmp_path / "config.json"
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  with pytest.raises(ValueError, match=r"config\.json is .*, expected a file; point to"):
    describe(tmp_path)


def test_a_byte_order_mark_is_read(folder_of):
  folder = folder_of("llada")
  expected = describe(folder)
  path = folder / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert describe(folder) == expected


def test_long_and_deep_values_are_shortened_in_messages(folder_of):
  deep: list = []
  for _ in range(200):
    deep = [deep]
  for value in (deep, "a" * 10_000, list(range(10_000)), {str(i): i for i in range(10_000)}):
    with pytest.raises(ValueError, match="hidden_act=") as caught:
      describe(folder_of("llama", hidden_act=value))
    assert len(str(caught.value)) < 400


SHAPES = {"a": (83, 64), "b": (96, 64), "c": (10**12, 0)}


@pytest.mark.parametrize("value", [97, 10**9, 10**12, 10**30], ids=str)
@pytest.mark.parametrize(
  ("family", "key", "others"),
  [
    ("llada", "n_layers", {}),
    ("llada", "embedding_size", {}),
    ("llada", "vocab_size", {"embedding_size": None}),
    ("llada", "d_model", {"n_heads": 1, "n_kv_heads": 1}),
    ("llada", "mlp_hidden_size", {}),
    ("llama", "num_hidden_layers", {}),
    ("llama", "vocab_size", {}),
    ("llama", "intermediate_size", {}),
    ("llama", "hidden_size", {"head_dim": 16}),
    ("llama", "num_attention_heads", {"head_dim": 16, "num_key_value_heads": None}),
    ("llama", "head_dim", {}),
  ],
)
def test_a_claim_beyond_what_the_files_hold_is_refused(folder_of, family, key, others, value):
  value += value % 2 if key in ("d_model", "head_dim") else 0
  folder = folder_of(family, **{**others, key: value})
  with pytest.raises(ValueError, match=rf"config\.json: {key}={value} is more than the safetensors hold") as caught:
    families.check_claims(folder, describe(folder), SHAPES)
  assert "fetch the files of one and the same model" in str(caught.value)


def test_sizes_that_the_files_hold_pass(folder_of):
  folder = folder_of("llada")
  families.check_claims(folder, describe(folder), SHAPES)


@pytest.mark.parametrize(("changes", "named"), [({"n_heads": 3}, "heads=6"), ({"n_kv_heads": 3}, "kv_heads=3")])
def test_sizes_that_do_not_fit_are_named(folder_of, changes, named):
  with pytest.raises(ValueError, match=f"config.json.*{named}"):
    describe(folder_of("llada", **changes))


@pytest.mark.parametrize(
  ("rows", "expected"), [(None, 83), (1, 83), (83, 83), (84, 128), (128, 128), (129, 256), (1000, 1024)]
)
def test_a_vocabulary_grows_to_a_multiple_of_128(rows, expected):
  size = TransformerSize(vocab=83, embed=64, heads=4, mlp=96, layers=2)
  grown = with_rows(size, rows)
  assert grown.vocab == expected
  assert (grown.embed, grown.layers) == (size.embed, size.layers)
  assert (grown is size) == (expected == 83)
