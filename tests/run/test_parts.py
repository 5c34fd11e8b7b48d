"""The parts of a method: their names and options on the command line, in files of users, and in older runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import export, recipe
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError
from d1jax.rl.losses import ClippedSequence, ClippedToken, Likelihood, Terms
from d1jax.run import parts
from d1jax.run.identity import holds_run
from d1jax.run.workdir import claim
from d1jax.training import configured
from tests import jobs, toy

SAMPLER = SamplerSpec(completion_length=6, diffusion_steps=6, block_length=3)
ROLLOUT = toy.rollout(batch=4, completion_length=6)
ROLLOUT = ROLLOUT._replace(reveal_step=jnp.broadcast_to(jnp.asarray([1, 0, 2, 3, 5, 4], jnp.int32), (4, 6)))
METHODS = (jobs.ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
IMPORTS = """
from d1jax.diffusion.likelihood import Scores, one_step
from d1jax.diffusion.trajectory import step_merged
from d1jax.rl.estimators import Estimator
"""


def block(section: str, number: int = 0) -> str:
  """A block of Python in a section of docs/methods.md."""
  return METHODS.split(f"## {section}")[1].split("```python")[number + 1].split("```")[0]


def chosen(*flags: str):
  """`config.grpo` with flags, on the toy's lengths, and the sampler."""
  config = jobs.load("grpo", "tiny")
  config.rollout.update(completion_length=6, diffusion_steps=6, block_length=3)
  config.grpo.loss.beta = 0.04
  found, others = parts.take_flags([f"--config.grpo.{flag}" for flag in flags])
  assert not others
  parts.choose(config.grpo, found)
  return config.grpo, SamplerSpec(**config.rollout)


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ([], ClippedToken(epsilon=0.5, beta=0.04)),
    (["loss=clipped_sequence"], ClippedSequence(epsilon=0.5, beta=0.04)),
    (["loss.name=likelihood"], Likelihood(beta=0.04)),
    (["loss.kl=k2", "loss=likelihood"], Likelihood(beta=0.04, kl="k2")),
    (["loss.epsilon=1", "loss.epsilon_high=0.6"], ClippedToken(epsilon=1.0, epsilon_high=0.6, beta=0.04)),
    (["loss.epsilon_high=0.6", "loss.epsilon_high=None"], ClippedToken(epsilon=0.5, beta=0.04)),
    # By the names of before.
    (["epsilon=0.2", "beta=0.1", "kl_against=old"], ClippedToken(epsilon=0.2, beta=0.1, kl_against="old")),
  ],
)
def test_the_command_line_chooses_a_loss_and_its_options(flags, expected):
  assert configured.method(*chosen(*flags)).loss == expected


def test_the_command_line_chooses_the_other_parts():
  built = configured.method(*chosen("estimator=step_merged", "segments=2", "advantage=mean_std"))
  assert (built.estimator.name, dict(built.estimator.bound)) == ("step_merged", {"segments": 2})
  assert built.advantage is parts.TABLES["advantage"]["mean_std"]


def test_other_arguments_are_left_as_they_are():
  others = [
    "d1jax",
    "--config=configs/grpo.py:tiny",
    "--config.grpo.steps=3",
    "--config.grpo.epsilon.a=1",
    "--config.sft.b1=0",
  ]
  given = [*others[:2], "-config.grpo.loss", "likelihood", *others[2:], "--config.grpo.loss.beta=0.1=2"]
  assert parts.take_flags(given) == ([("loss", "", "likelihood"), ("loss", "beta", "0.1=2")], others)


def test_the_documented_loss_is_one_file(tmp_path):
  file = tmp_path / "soft.py"
  file.write_text(block("A loss of your own"))
  section, sampler = chosen(f"loss.module={file}", "loss.softness=2")
  assert section.loss.to_dict() == {"name": str(file), "softness": 2}
  built = configured.method(section, sampler)
  assert (built.loss.softness, built.scores_old, built.scores_reference) == (2.0, True, False)
  one, ratio = jnp.ones((1, 2)), np.asarray([[1.0, 1.5]], np.float32)
  given = Terms(Scores(jnp.log(ratio), one), jnp.zeros((1, 2)), None, jnp.ones(1), one, one)
  loss, figures = built.loss(given)
  gate = 1 / (1 + np.exp(-2 * (ratio - 1)))
  np.testing.assert_allclose(loss, -(2 * gate).sum(), rtol=1e-6)
  np.testing.assert_allclose(figures["gate_open"], (4 * gate * (1 - gate)).sum(), rtol=1e-6)


def test_the_documented_estimator_and_advantage_are_one_file(tmp_path):
  file = tmp_path / "mine.py"
  section = "An estimator or an advantage of your own"
  file.write_text(IMPORTS + block(section, 1) + block(section, 0))
  built = configured.method(*chosen(f"estimator={file}", f"advantage={file}", "advantage.power=2.0"))
  np.testing.assert_allclose(built.advantage(jnp.asarray([1.0, 0.0, 2.0, 5.0]), 2), [0.25, -0.25, -2.25, 2.25])
  assert built.estimator.recorded
  score = lambda estimator: jax.jit(
    lambda rollout: estimator(toy.DENOISER, toy.params(), rollout, SAMPLER, jax.random.key(0)).logp
  )(ROLLOUT)
  halves = [configured.method(*chosen(*flags)).estimator for flags in ([], ["estimator=step_merged", "segments=2"])]
  np.testing.assert_allclose(score(built.estimator), sum(map(score, halves)) / 2, rtol=1e-5)


LOSS = """
import dataclasses
from d1jax.rl.losses import Loss

@dataclasses.dataclass(frozen=True)
class Mine(Loss):
  tau: float = 1.0

  def __post_init__(self):
    if self.tau < 0:
      raise ValueError(f"tau={self.tau} must not be negative")

  def __call__(self, terms):
    return BODY

loss = Mine
"""


@pytest.mark.parametrize(
  ("text", "flags", "message"),
  [
    ("loss = 3", [], "mine.py: `loss` is 3, but the file must define it as a subclass of Loss$"),
    ("", [], "mine.py: `loss` is None, but the file must define it"),
    ("1 / 0", [], "mine.py line 1: ZeroDivisionError: division by zero"),
    (None, [], "mine.py: no such Python file under .*; name the .py file that defines loss$"),
    ("0", ["loss.taw=1"], "grpo.loss.taw=1 is no option of grpo.loss=.*mine.py, which has tau: leave it out"),
    ("0", ["loss.tau=wide"], "grpo.loss.tau='wide' must be a finite number"),
    ("0", ["loss.tau=-1"], "grpo.loss=.*mine.py line 11: tau=-1 must not be negative"),
    ("0", [], "mine.py: returned .*; it must return a number and a dictionary of figures"),
    ("terms.scores.logp - terms.old_logp, {}", [], "grpo.loss=.*mine.py line 14: TypeError"),
    ("terms.scores.logp.sum(), {'loss': terms.share.sum()}", [], "the figure loss has a name that is taken: loss, "),
    ("terms.scores.logp.sum(), {'mine': terms.share}", [], "the figure mine is .* must be a number"),
  ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_compiled(tmp_path, text, flags, message):
  file = tmp_path / "mine.py"
  if text is not None:
    file.write_text(LOSS.replace("BODY", text) if "loss =" not in text and "1 / 0" not in text and text else text)
  with pytest.raises(ValueError, match=message):
    configured.method(*chosen(f"loss={file}", *flags))


OLD = {  # what a run of 0.1 wrote of its method: tiny,sudoku,espo
  "estimator": "elbo",
  "samples": 4,
  "nodes": None,
  "segments": None,
  "masking": "count",
  "antithetic": True,
  "exponent": None,
  "top_entropy": None,
  "loss": "clipped_sequence",
  "epsilon": 0.2,
  "epsilon_high": None,
  "upper_share": None,
  "beta": 0.0,
  "kl": "k2",
  "kl_against": "reference",
  "advantage": "leave_one_out",
}


def test_a_run_of_before_goes_on(tmp_path):
  config = jobs.load("grpo", "tiny,sudoku,espo")
  old = json.loads(config.to_json())
  old["grpo"] = {name: value for name, value in old["grpo"].items() if name not in parts.TABLES} | OLD
  claim(tmp_path, old, {}, {})
  parts.complete(config)
  assert parts.renewed(old)["grpo"] == json.loads(config.to_json())["grpo"]
  assert holds_run(tmp_path, config.to_dict())
  config.grpo.loss.epsilon = 0.3
  with pytest.raises(RunError, match=r"grpo.loss.epsilon was 0.2, now 0.3"):
    holds_run(tmp_path, config.to_dict())


def test_an_option_that_is_new_has_its_default_in_a_run_that_began_without():
  config = {"grpo": {**OLD, "loss": {"name": "likelihood", "beta": 0.1}}}
  expected = {"name": "likelihood", "beta": 0.1, "kl": "k3", "kl_against": "reference"}
  assert parts.renewed(config)["grpo"]["loss"] == expected
  assert parts.renewed({"sft": {"steps": 3}}) == {"sft": {"steps": 3}}
  file = {"grpo": {kind: {"name": "nowhere.py", "tau": 2} for kind in parts.TABLES}}
  assert parts.renewed(file) == file, "a reader runs no file"


@pytest.mark.slow(reason="runs the recipe")
def test_a_loss_of_a_file_trains_and_logs_its_figure(tmp_path):
  file, workdir = tmp_path / "soft.py", tmp_path / "run"
  file.write_text(block("A loss of your own"))
  changes = {"grpo__steps": 2, "grpo__num_iterations": 2, "grpo__loss": file, "grpo__loss__softness": 2.0}
  recipe.run(jobs.started(workdir, **changes))
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert len(records) == 2
  assert 0 < records[-1]["gate_open"] < 1, "the second inner step has moved"
  config = json.loads((workdir / "config.json").read_text())
  assert config["grpo"]["loss"] == {"name": str(file), "softness": 2.0}
  # Whoever reads the run does not run the file.
  file.write_text("raise SystemExit('run')")
  given = jobs.load("export")
  given.update(checkpoint=str(workdir), output=str(tmp_path / "exported"))
  export.run(given)
