import json

import jax
import pytest

from d1jax.models import families, transformer
from d1jax.models.families import describe, with_rows
from d1jax.models.layers import RopeScaling
from d1jax.models.transformer import PRESETS, TransformerSize
from tests.models import folders

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
  assert size.qkv_bias == (family in ("dream", "qwen2"))
  assert size.tied == (family in ("qwen2", "llama_tied"))
  assert found.shift == (0 if family.startswith("llada") else 1)
  assert found.mask_id == (s["vocab"] - 4 if family.startswith(("llada", "dream")) else None)
  assert found.family == family.removesuffix("_llama_names").removesuffix("_tied")
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
  assert (found.family, found.shift, found.mask_id) == (family, shift, mask_id)
  network = transformer.build(found.size)
  assert transformer.parameter_count(network) == parameters
  assert found.size.head_size == 128
  shapes = lambda size: jax.eval_shape(transformer.build(size).init, jax.random.key(0))
  assert shapes(found.size) == shapes(PRESETS[preset])
  for value in ("rope_theta", "norm_eps", "key_value_heads", "qkv_bias", "tied", "rope_scaling"):
    assert getattr(found.size, value) == getattr(PRESETS[preset], value), value


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
  ("mlp_hidden_size", None),
  ("embedding_size", "83"),
  ("rope_theta", "500000.0"),
  ("rope_theta", None),
  ("rope_theta", float("nan")),
  ("rms_norm_eps", "1e-05"),
  ("rms_norm_eps", float("inf")),
  ("weight_tying", "false"),
]


@pytest.mark.parametrize(("key", "value"), LLADA_CHANGES, ids=str)
def test_what_lladas_configuration_may_not_say(folder_of, key, value):
  folder = folder_of("llada", **{key: value})
  with pytest.raises(ValueError, match=key) as caught:
    describe(folder)
  assert str(folder / "config.json") in str(caught.value)
  if value is not None and value == value:  # not NaN
    assert repr(value) in str(caught.value), "the value is not named"


HUB_CHANGES = [
  ("hidden_act", "gelu"),
  ("attention_bias", True),
  ("attention_dropout", 0.1),
  ("mlp_bias", True),
  ("use_sliding_window", True),
  ("use_mrope", True),
  ("partial_rotary_factor", 0.5),
  ("pretraining_tp", 2),
  ("quantization_config", {"load_in_4bit": True}),
  ("layer_types", ["full_attention", "sliding_attention"]),
  ("layer_types", ["chunked_attention"]),
  ("layer_types", "full_attention"),
  ("model_type", "qwen3"),
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
  [("llada", k) for k in ("model_type", "d_model", "n_heads", "mlp_hidden_size", "n_layers", "rope_theta")]
  + [("llada", "rms_norm_eps")]
  + [("qwen2", k) for k in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "rope_theta")]
  + [("qwen2", k) for k in ("num_hidden_layers", "rms_norm_eps")],
)
def test_a_missing_key_is_named(folder_of, family, key):
  folder = folder_of(family, **{key: ...})
  with pytest.raises(ValueError, match=f"config.json.*'{key}'"):
    describe(folder)


def test_a_missing_vocabulary_is_named(folder_of):
  assert describe(folder_of("llada", vocab_size=...)).size.vocab == 83
  assert describe(folder_of("llada", embedding_size=None)).size.vocab == 83
  with pytest.raises(ValueError, match="vocab_size"):
    describe(folder_of("llada", vocab_size=..., embedding_size=...))


def test_embedding_size_goes_before_vocab_size(folder_of):
  assert describe(folder_of("llada", vocab_size=80, embedding_size=96)).size.vocab == 96


def test_what_may_be_null_or_left_out(folder_of):
  whole = describe(folder_of("llada")).size
  nulls = {name: None for name in families.LLADA_FIXED if not families.LLADA_FIXED[name]}
  assert describe(folder_of("llada", **nulls, n_kv_heads=None)).size == whole
  assert describe(folder_of("llada", **dict.fromkeys(families.LLADA_FIXED, ...), weight_tying=...)).size == whole
  dream = describe(folder_of("dream")).size
  assert describe(folder_of("dream", head_dim=None, layer_types=["full_attention"] * 3)).size == dream
  alone = describe(folder_of("dream", num_key_value_heads=None)).size
  assert alone.key_value_heads == alone.heads == 4


def test_model_types_are_read_in_any_case(folder_of):
  assert describe(folder_of("dream", model_type="dream")).family == "dream"
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


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llada"', "3", '[{"model_type": "llada"}]', "\x00"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text, encoding="utf-8")
  with pytest.raises(ValueError, match=r"config\.json is not the configuration of a model"):
    describe(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path):
  (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
  with pytest.raises(ValueError, match=r"config\.json is not the configuration of a model"):
    describe(tmp_path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere/config\.json is missing: point to"):
    describe(tmp_path / "nowhere")


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
