import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import d1jax
from d1jax import model
from d1jax.models import transformer
from d1jax.models.layers import Visible, plain_attention
from d1jax.models.transformer import TransformerSize
from d1jax.models.visibility import BlockCausal
from d1jax.parallel import attention as kernels
from d1jax.parallel.mesh import MESH_AXES, RULES, constrainer, make_mesh, sharding, shardings
from d1jax.run import experiment as experiments
from tests import hub, jobs

SIZE = TransformerSize(vocab=256, embed=256, heads=4, kv_heads=2, head_dim=128, mlp=256, layers=2)


def arrays(t, s, *, b=2, n=2, k=2, h=16, padding="left"):
  """Queries, keys, values, and which keys count."""
  rng = np.random.default_rng(t * s + n)
  shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
  q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  cut = np.asarray([s // 3, 0, s // 2, 1, 2, 3, 5, 7])[:b, None]
  place = np.arange(s)[None]
  valid = {"left": place >= cut, "right": place < s - cut, "holes": rng.random((b, s)) < 0.5}[padding]
  return q, k, v, Visible(jnp.asarray(valid))


def mesh_of(*sizes, devices=None):
  devices = jax.devices() if devices is None else devices
  return make_mesh(dict(zip(MESH_AXES, sizes, strict=False)), devices[: int(np.prod(sizes))])


def outcomes(attention, inputs):
  """What comes out, and the gradients of a sum with weights of no pattern."""
  q, k, v, visible = inputs
  weights = jnp.asarray(np.random.default_rng(0).normal(size=q.shape), jnp.float32)

  def loss(q, k, v):
    out = attention(q, k, v, visible)
    return jnp.sum(weights * out), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *gradients


def assert_agree(attention, inputs):
  for found, expected in zip(outcomes(attention, inputs), outcomes(plain_attention, inputs), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.few(2, reason="the kernel is interpreted")
@pytest.mark.parametrize(
  ("t", "s", "heads", "padded"),
  [
    (128, 128, {}, (2, 128, 128)),
    (200, 200, {"padding": "holes"}, (2, 256, 256)),
    (200, 200, {"padding": "right", "n": 4}, (4, 256, 256)),
    (130, 300, {"n": 4, "k": 1}, (4, 256, 384)),
    (530, 530, {"b": 1, "h": 24}, (2, 768, 768)),
    (150, 150, {"h": 128}, (2, 256, 256)),
  ],
)
def test_splash_attention_is_plain_attention(interpreted, t, s, heads, padded):
  assert_agree(kernels.splash_attention, arrays(t, s, **heads))
  assert interpreted[0] == padded


def test_a_row_without_valid_keys_stays_finite(interpreted):
  q, k, v, visible = arrays(128, 128)
  found = outcomes(kernels.splash_attention, (q, k, v, Visible(visible.valid.at[0].set(False))))
  assert all(np.isfinite(x).all() for x in found)
  np.testing.assert_allclose(found[0][1], plain_attention(q, k, v, visible)[1], rtol=0, atol=1e-5)


def test_blocks_are_few_and_waste_little():
  for length in range(1, 5000):
    block, padded = kernels._blocks(length)
    assert block % kernels.LANES == 0 < block <= kernels.BLOCK
    assert padded % block == 0 <= padded - length < kernels.LANES * (padded // block)
    assert padded // block == -(-length // kernels.BLOCK)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize(
  ("sizes", "rules"),
  [
    ((2, 2, 2), {}),
    ((1, 4, 2), {"batch": "fsdp"}),
    ((2, 2, 2), {"batch": "data", "heads": None}),
    ((2, 2, 2), {"kv_heads": None}),
    ((1, 2, 2, 2), {}),
  ],
)
def test_each_device_computes_its_rows_and_heads(interpreted, sizes, rules):
  rules = {**RULES, **rules}
  attention = kernels.per_device(kernels.splash_attention, mesh_of(*sizes), rules)
  length = 130 * (2 if len(sizes) == 4 else 1)  # a device has enough queries for the kernel
  assert_agree(attention, arrays(length, length, b=4, n=4, k=2))
  assert {shape[0] for shape in interpreted} == {4 if rules["heads"] is None else 2}


@pytest.mark.parametrize("shape", [{"b": 3, "n": 4, "k": 2}, {"b": 4, "n": 6, "k": 3}])
def test_what_the_mesh_does_not_divide_is_left_to_xla(interpreted, shape):
  attention = kernels.per_device(kernels.splash_attention, mesh_of(2, 2, 2), RULES)
  inputs = arrays(130, 130, **shape)
  np.testing.assert_array_equal(jax.jit(attention)(*inputs), jax.jit(plain_attention)(*inputs))
  assert not interpreted


@pytest.mark.parametrize(("t", "h"), [(127, 16), (128, 12), (128, 136)])
def test_what_splash_attention_does_not_serve_is_plain(interpreted, t, h):
  inputs = arrays(t, 130, h=h)
  np.testing.assert_array_equal(kernels.splash_attention(*inputs), plain_attention(*inputs))
  assert not interpreted


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 1, 4)], ids=str)
@pytest.mark.parametrize("length", [24, 10])
def test_devices_that_share_an_attention_keep_the_rule(sizes, length):
  """Each knows where its queries begin; lengths that the mesh does not divide are left to XLA."""
  attention = kernels.per_device(plain_attention, mesh_of(*sizes), RULES)
  q, k, v, visible = arrays(length, 24, b=4, n=4, k=2)
  assert_agree(attention, (q, k, v, Visible(visible.valid, BlockCausal(5), 24 - length)))


@pytest.mark.parametrize(
  ("device", "expected"),
  [
    ({"platform": "cpu"}, plain_attention),
    ({"platform": "tpu"}, kernels.splash_attention),
    ({"platform": "gpu", "compute_capability": "9.0"}, kernels.cudnn_attention),
    ({"platform": "gpu", "compute_capability": "12.0"}, kernels.cudnn_attention),
    ({"platform": "gpu", "compute_capability": "7.5"}, plain_attention),
    ({"platform": "gpu", "compute_capability": "gfx942"}, plain_attention),
  ],
)
def test_the_platform_chooses(device, expected):
  assert kernels.of_device(types.SimpleNamespace(**device)) is expected


def test_devices_that_share_positions_attend_to_all_keys():
  """Plain attention as well: each device has its queries, and no other device computes for them."""
  mesh = mesh_of(1, 2, 1, 4)
  attention = kernels.attention(mesh, RULES)
  inputs = arrays(24, 24, n=4, k=2)
  assert_agree(attention, inputs)

  def largest(attention, placement):
    """Numbers of the largest array of a device."""
    text = jax.jit(attention, out_shardings=placement).lower(*inputs).compile().as_text()
    return max(math.prod(int(n) for n in shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", text))

  logits, keys = 4 * 24 * 24, 24 * 2 * 16
  assert largest(attention, sharding(mesh, RULES, "batch", "length", "heads", None)) == keys > logits // 4
  assert largest(plain_attention, sharding(mesh, RULES)) >= logits


def test_queries_that_the_mesh_does_not_divide_are_left_to_xla():
  inputs = arrays(10, 24, n=4, k=2)
  attention = kernels.attention(mesh_of(1, 2, 1, 4), RULES)
  np.testing.assert_array_equal(jax.jit(attention)(*inputs), jax.jit(plain_attention)(*inputs))


def test_a_cpu_keeps_plain_attention():
  assert kernels.attention(mesh_of(2, 2, 2), RULES) is plain_attention


def lowered_for_cuda(function, t, s, dtype=jnp.bfloat16, h=128, rule=None):
  shapes = ((8, t, 8, h), (8, s, 4, h), (8, s, 4, h))
  arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes] + [jax.ShapeDtypeStruct((8, s), bool)]
  attend = lambda q, k, v, valid: function(q, k, v, Visible(valid, rule, s - t))  # as an argument, it would be traced
  return jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(text):
  """Each call of cuDNN, and the shapes of its operands."""
  calls = re.findall(r"custom_call @__cudnn\$(\w+)\(.* : \((.*)\) ->", text)
  return [(name, re.findall(r"tensor<([^>]*)>", shapes)) for name, shapes in calls]


def test_cudnn_takes_the_number_of_valid_keys(cudnn_found):
  attention = kernels.per_device(kernels.cudnn_attention, mesh_of(2, 2, 2), RULES)
  operands = ["2x58x4x128xbf16", "2x58x2x128xbf16", "2x58x2x128xbf16", "2xi32", "2xi32"]
  assert cudnn_calls(lowered_for_cuda(attention, 58, 58)) == [("fmhaSoftmax", operands)]
  gradient = jax.grad(lambda *x: jnp.sum(attention(*x).astype(jnp.float32)), argnums=(0, 1, 2))
  text = lowered_for_cuda(gradient, 58, 58)
  assert {name for name, _ in cudnn_calls(text)} == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
  assert set(re.findall(r"unique_indices = (\w+)", text)) == {"true"}, "no atomics"


def test_cudnn_takes_the_mask_of_a_window(cudnn_found):
  attention = kernels.per_device(kernels.cudnn_attention, mesh_of(2, 2, 2), RULES)
  operands = ["2x33x4x128xbf16", "2x58x2x128xbf16", "2x58x2x128xbf16", "2x1x33x58xbf16"]
  assert cudnn_calls(lowered_for_cuda(attention, 33, 58)) == [("fmhaScaleBiasSoftmax", operands)]


@pytest.mark.parametrize(
  ("dtype", "s", "h"),
  [(jnp.float32, 58, 128), (jnp.bfloat16, 57, 128), (jnp.bfloat16, 58, 12), (jnp.bfloat16, 58, 136)],
)
def test_what_cudnn_does_not_serve_is_plain(cudnn_found, dtype, s, h):
  text = lowered_for_cuda(kernels.cudnn_attention, s, s, dtype, h)
  assert text == lowered_for_cuda(plain_attention, s, s, dtype, h).replace("plain_attention", "cudnn_attention")


@jax.custom_vjp
def spoiled(x, count):
  """The identity, whose gradient beyond `count` rows is not a number."""
  del count
  return x


def spoil(count, gradient):
  beyond = np.arange(gradient.shape[1])[None] >= count[:, None]
  return jnp.where(beyond[:, :, None, None], jnp.nan, gradient), None


spoiled.defvjp(lambda x, count: (x, count), spoil)


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("t", [9, 33])
def test_what_cudnn_is_given_means_the_same(monkeypatch, t, padding):
  """The same call, answered by XLA in float32, with rubbish where a kernel need not write."""
  answer = jax.nn.dot_product_attention

  def answered(q, k, v, implementation=None, key_value_seq_lengths=None, **options):
    if implementation == "cudnn" and key_value_seq_lengths is not None:
      k, v = spoiled(k, key_value_seq_lengths), spoiled(v, key_value_seq_lengths)
    return answer(q, k, v, key_value_seq_lengths=key_value_seq_lengths, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
  monkeypatch.setattr(kernels, "_served_by_cudnn", lambda k: True)
  assert_agree(kernels.cudnn_attention, arrays(t, 33, n=4, padding=padding))


def splash_calls(compiled):
  """How often each kernel is called in a program."""
  lines = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
  names = [re.search(r"splash_mha_(fwd|dq|dkv)\w*", line)[1] for line in lines]
  return {name: names.count(name) for name in sorted(set(names))}


def structs(tree, placement):
  return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, placement)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 2)], ids=str)
def test_the_kernel_compiles_for_tpus(tpu, sizes):
  mesh = mesh_of(*sizes, devices=tpu)
  attention = kernels.attention(mesh, RULES)
  heads, row = sharding(mesh, RULES, "batch", None, "heads", None), sharding(mesh, RULES, "batch", None)
  shapes = ((4, 456, 8, 128), (4, 456, 4, 128), (4, 456, 4, 128))
  inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=heads) for shape in shapes]
  inputs.append(Visible(jax.ShapeDtypeStruct((4, 456), bool, sharding=row)))
  gradient = jax.grad(lambda *x: jnp.sum(attention(*x).astype(jnp.float32) ** 2), argnums=(0, 1, 2))
  compiled = jax.jit(gradient, out_shardings=heads).lower(*inputs).compile()
  assert splash_calls(compiled) == {"dkv": 1, "dq": 1, "fwd": 1}
  assert "all-gather" not in compiled.as_text()
  assert "all-reduce" not in compiled.as_text()


@pytest.fixture
def network(tpu):
  """A small network on four TPUs, with the shapes of its arguments."""
  mesh = mesh_of(1, 2, 2, devices=tpu)
  attention, constrain = kernels.attention(mesh, RULES), constrainer(mesh, RULES)
  network = transformer.build(SIZE, dtype=jnp.bfloat16, remat=True, constrain=constrain, attention=attention)
  row = sharding(mesh, RULES, "batch", None)
  params = structs(jax.eval_shape(network.init, jax.random.key(0)), shardings(mesh, RULES, network.axes))
  tokens = lambda width: jax.ShapeDtypeStruct((4, width), jnp.int32, sharding=row)
  return network, params, tokens, jax.ShapeDtypeStruct((4, 200), bool, sharding=row)


def test_a_network_compiles_for_tpus(network):
  network, params, tokens, valid = network
  assert splash_calls(jax.jit(network.encode).lower(params, tokens(200), valid).compile()) == {"fwd": 1}
  loss = lambda params, *batch: jnp.sum(network.encode(params, *batch).astype(jnp.float32) ** 2)
  compiled = jax.jit(jax.grad(loss)).lower(params, tokens(200), valid).compile()
  calls = splash_calls(compiled)
  assert calls == {"dkv": 1, "dq": 1, "fwd": 2}, "the backward pass runs each layer's forward pass again"


@pytest.mark.parametrize(("width", "calls"), [(200, {"fwd": 1}), (130, {"fwd": 1}), (33, {})])
def test_a_window_of_the_cache_compiles_for_tpus(network, width, calls):
  network, params, tokens, valid = network
  cache = jax.eval_shape(network.init_cache, valid)
  compiled = jax.jit(network.encode_window).lower(params, tokens(width), 7, cache).compile()
  assert splash_calls(compiled) == calls


def test_an_experiment_gets_the_attention_of_its_mesh(tpu):
  config = jobs.load("grpo", "llada_8b")
  config.update_from_flattened_dict(
    {"model.overrides.embed": 512, "model.overrides.heads": 4, "model.overrides.mlp": 512, "model.overrides.layers": 1}
  )
  experiment = experiments.build(config, None, tpu)
  params = jax.eval_shape(experiment.model.weights.network.init, jax.random.key(0))
  arguments = params, jax.ShapeDtypeStruct((4, 456), jnp.int32), jax.ShapeDtypeStruct((4, 456), bool)
  text = jax.jit(experiment.model.denoiser.encode).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("@tpu_custom_call") == 1


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_folder_gets_the_attention_of_its_mesh(tmp_path, monkeypatch):
  made = []

  def attention(mesh, rules):
    made.append((mesh, rules))
    return lambda q, k, v, visible: jnp.zeros_like(q)

  monkeypatch.setattr(model, "attention", attention)
  mesh, rules = mesh_of(1, 2, 1), {**RULES, "mlp": None}
  found = d1jax.from_pretrained(hub.write(tmp_path, "llama", dtype="float32"), jnp.float32, mesh=mesh, rules=rules)
  assert made == [(mesh, rules)]
  tokens, valid = jnp.asarray([[1, 2, 3], [1, 4, 3]]), jnp.ones((2, 3), bool)
  hidden = found.denoiser.encode(found.params, tokens, valid)
  np.testing.assert_array_equal(hidden[0, 0], hidden[1, 0], "nothing is mixed")
