"""Estimates of log p(answer | prompt) against LLaDA's formula, written down again, and against enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.answers import Answers, answer_logps, is_greedy
from tests import toy
from tests.diffusion import causal

KEY = jax.random.key(7)
PARAMS = toy.params()
LENGTHS, PROMPTS = (4, 3, 1, 4), (3, 1, 2, 4)


def answers(prompt_width=5, answer_width=6, vocab=toy.MASK) -> Answers:
  prompt, valid = toy.prompts(list(PROMPTS), prompt_width)
  rng = np.random.default_rng(4)
  rows = np.zeros((4, answer_width), np.int32)
  for row, length in enumerate(LENGTHS):
    rows[row, :length] = rng.integers(3, vocab, length)
  ids = jnp.asarray([21, 5, 8, 13], jnp.int32)
  return Answers(prompt, valid, jnp.asarray(rows), jnp.asarray(LENGTHS, jnp.int32), ids)


def logits(canvas: list[int]) -> np.ndarray:
  """[L V] in float64, for a sequence that ends where the answer ends."""
  return toy.allowed(_encoded(tuple(canvas)))


@functools.cache
def _encoded(canvas: tuple[int, ...]) -> np.ndarray:
  return np.asarray(_forward(np.asarray([canvas], np.int32)))[0]


@jax.jit
def _forward(tokens):
  return toy.encode(PARAMS, tokens, jnp.ones(tokens.shape, bool)) @ toy.head(PARAMS)


def masked_logp(prompt: list[int], answer: list[int], masked: tuple[bool, ...], cfg_scale=0.0) -> float:
  """The sum of log p over the masked tokens, by LLaDA's sequence: the prompt, the answer, and nothing behind it."""
  known = [toy.MASK if m else t for m, t in zip(masked, answer, strict=True)]
  found = logits(prompt + known)
  if cfg_scale:
    blind = logits([toy.MASK] * len(prompt) + known)
    with np.errstate(invalid="ignore"):
      found = toy.allowed(blind + (cfg_scale + 1) * (found - blind))
  logp = toy.log_softmax(found)
  return sum(logp[len(prompt) + i, answer[i]] for i, m in enumerate(masked) if m)


def rows_of(given: Answers) -> list[tuple[list[int], list[int], int]]:
  return [
    (prompt[valid].tolist(), answer[:length].tolist(), int(identity))
    for prompt, valid, answer, length, identity in zip(*map(np.asarray, given), strict=True)
  ]


def formula(
  prompt: list[int], answer: list[int], identity: int, samples: int, strata: int, cfg_scale: float
) -> list[float]:
  """LLaDA's get_loglikelihood for one request, with our draws; halves are rounded up."""
  n, found = len(answer), []
  for repeat in range(samples // strata):
    own = jax.random.fold_in(jax.random.fold_in(KEY, identity), repeat)
    k = 1 + int(float(jax.random.uniform(jax.random.fold_in(own, 0), (1,))[0]) * n)
    total = 0.0
    for i, at in enumerate(np.linspace(k, k + (strata - 1) * n / strata, strata)):
      x = (math.floor(at + 0.5) - 1) % n + 1
      order = np.argsort(jax.random.uniform(jax.random.fold_in(own, 1 + i), (n,)))
      masked = tuple(position in order[:x] for position in range(n))
      total += masked_logp(prompt, answer, masked, cfg_scale) / (x / n)
    found.append(total / strata)
  return found


def bound(prompt: list[int], answer: list[int]) -> float:
  """The mean over all counts and all masks."""
  n, total = len(answer), 0.0
  for count in range(1, n + 1):
    chosen = [tuple(i in c for i in range(n)) for c in itertools.combinations(range(n), count)]
    total += sum(n / count * masked_logp(prompt, answer, masked) for masked in chosen) / len(chosen)
  return total / n


def estimates(given: Answers, key=KEY, **options) -> np.ndarray:
  return np.asarray(jax.jit(lambda *given: answer_logps(toy.DENOISER, PARAMS, *given, **options))(given, key))


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize(("samples", "strata", "cfg_scale"), [(4, 2, 0.5), (8, 4, 0.0), (3, 1, 0.0)])
def test_it_is_lladas_formula(samples, strata, cfg_scale):
  found = estimates(answers(), samples=samples, strata=strata, cfg_scale=cfg_scale)
  expected = [formula(*row, samples, strata, cfg_scale) for row in rows_of(answers())]
  np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("strata", [2, 1, 4])
def test_it_is_unbiased(strata):
  """Against the enumeration of all masks; with 2 strata and 3 tokens, LLaDA's rounding would not be."""
  draw = jax.jit(lambda key: answer_logps(toy.DENOISER, PARAMS, answers(), key, samples=4 * strata, strata=strata))
  found = np.concatenate([draw(key) for key in jax.random.split(KEY, 250)], axis=1)
  expected = [bound(prompt, answer) for prompt, answer, _ in rows_of(answers())]
  error = found.std(axis=1, ddof=1) / math.sqrt(found.shape[1])
  assert (np.abs(found.mean(axis=1) - expected) < 4 * error + 1e-4).all()
  assert error[2] < 1e-5, "an answer of one token has one mask"


def test_every_count_is_as_frequent_as_the_others_in_each_stratum():
  from d1jax.diffusion import answers as module

  many = 3000
  inside = jnp.ones((many, 3), bool)
  number = jnp.broadcast_to(jnp.arange(3), (many, 3))
  window = module._Window(jnp.zeros((many, 3), jnp.int32), inside, number, jnp.zeros((many, 3), jnp.int32), None)
  for stratum in range(2):
    masked, weight = module._masks(window, jnp.arange(many), KEY, jnp.asarray(stratum), 2)
    counts = np.asarray(masked).sum(axis=1)
    np.testing.assert_allclose(weight[:, 0], 3 / counts, rtol=1e-6)
    assert (np.abs(np.bincount(counts, minlength=4)[1:] / many - 1 / 3) < 0.04).all()


@pytest.mark.slow(reason="compiles programs of its own")
def test_neither_padding_nor_company_changes_a_row():
  alone = estimates(answers(), samples=4, strata=2)
  np.testing.assert_allclose(estimates(answers(9, 11), samples=4, strata=2), alone, rtol=2e-5)
  order = jnp.asarray([2, 0, 3])
  moved = estimates(jax.tree.map(lambda x: x[order], answers()), samples=4, strata=2)
  np.testing.assert_allclose(moved, alone[np.asarray(order)], rtol=2e-5)


def greedy_by_hand(prompt: list[int], n: int) -> list[int]:
  known = [toy.MASK] * n
  for _ in range(n):
    logp = toy.log_softmax(logits(prompt + known))[len(prompt) :]
    place = max((i for i in range(n) if known[i] == toy.MASK), key=lambda i: logp[i].max())
    known[place] = int(logp[place].argmax())
  return known


def test_greedy_answers_are_found_as_llada_finds_them():
  given = answers()
  right = np.array(given.answer)
  for row, (prompt, answer, _) in enumerate(rows_of(given)):
    right[row, : len(answer)] = greedy_by_hand(prompt, len(answer))
  check = jax.jit(lambda answer: is_greedy(toy.DENOISER, PARAMS, given._replace(answer=answer)))
  assert check(jnp.asarray(right)).all()
  for place in range(3):
    wrong = right.copy()
    wrong[:2, place] = (wrong[:2, place] + 1) % 3 + 3
    assert check(jnp.asarray(wrong)).tolist() == [False, False, True, True]


BLOCKED = [(4, 1), (4, 0), (1, 0), (1, 1)]


def block_case(block, shift):
  denoiser, params = causal.denoiser(block, shift), causal.params()
  given = answers(5, 6, causal.MASK)
  encode = lambda tokens: denoiser.encode(params, tokens, jnp.ones(tokens.shape, bool))
  logits = jax.jit(lambda tokens: denoiser.logits(params, encode(tokens)))

  def logp(canvas: list[int]) -> np.ndarray:
    """Of a sequence of whole blocks; [L V], the row of a token predicts it."""
    found = logits(np.asarray([canvas], np.int32))[0]
    return np.roll(toy.log_softmax(np.asarray(found)), shift, axis=0)

  return denoiser, params, given, logp


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize(("block", "shift"), BLOCKED)
def test_blocks_follow_the_chain_rule_and_are_bounded_within(block, shift):
  """A block is a sequence of its own behind all earlier ones; masks fill the last block."""
  denoiser, params, given, logp = block_case(block, shift)
  draw = jax.jit(lambda key: answer_logps(denoiser, params, given, key, samples=4, strata=4))
  found = np.concatenate([draw(key) for key in jax.random.split(KEY, 1 if block == 1 else 150)], axis=1)
  for row, (prompt, answer, _) in enumerate(rows_of(given)):
    total, whole = 0.0, prompt + answer
    for start in range(len(prompt) // block * block, len(whole), block):
      own = list(range(max(start, len(prompt)), min(start + block, len(whole))))
      groups = [own[:1], own[1:]] if shift and own[0] == start else [own]
      for group in filter(None, groups):
        known_before = groups[0] if group is not groups[0] else []
        for count in range(1, len(group) + 1):
          chosen = list(itertools.combinations(group, count))
          for masked in chosen:
            canvas = [*whole, *[denoiser.mask_id] * (start + block - len(whole))][: start + block]
            hidden = set(masked) | (set(own) - set(group) - set(known_before))
            canvas = [denoiser.mask_id if i in hidden else token for i, token in enumerate(canvas)]
            total += sum(logp(canvas)[i, whole[i]] for i in masked) / count / len(chosen)
    error = found[row].std(ddof=1) / math.sqrt(found.shape[1]) if block > 1 else 0.0
    assert abs(found[row].mean() - total) < 4 * error + 1e-4


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize(("block", "shift"), BLOCKED[:2])
def test_greedy_answers_of_blocks(block, shift):
  denoiser, params, given, logp = block_case(block, shift)
  right = np.array(given.answer)
  for row, (prompt, answer, _) in enumerate(rows_of(given)):
    whole = [*prompt, *[denoiser.mask_id] * len(answer)]
    padded = whole + [denoiser.mask_id] * (-len(whole) % block)
    for start in range(len(prompt) // block * block, len(whole), block):
      while holes := [i for i in range(start, min(start + block, len(whole))) if padded[i] == denoiser.mask_id]:
        found = logp(padded[: start + block])
        first = shift and holes[0] == start
        place = start if first else max(holes, key=lambda i: found[i].max())
        padded[place] = int(found[place].argmax())
    right[row, : len(answer)] = padded[len(prompt) : len(whole)]
  check = jax.jit(lambda answer: is_greedy(denoiser, params, given._replace(answer=answer)))
  assert check(jnp.asarray(right)).all()
  wrong = right.copy()
  wrong[:, 0] = (wrong[:, 0] + 1) % 3 + 3
  assert not check(jnp.asarray(wrong)).any()


def test_what_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match="samples=6 masks do not fall into sets of strata=4"):
    estimates(answers(), samples=6, strata=4)
  with pytest.raises(ValueError, match=r"cfg_scale=0\.5 masks the prompt .* use cfg_scale=0"):
    answer_logps(causal.denoiser(4), causal.params(), answers(), KEY, samples=1, cfg_scale=0.5)
