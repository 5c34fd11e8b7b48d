"""FLOPs of the programs of an iteration, by formula: XLA's own count takes the body of a loop once."""

from d1jax.models import flops
from d1jax.run.experiment import Experiment
from d1jax.telemetry import cost
from d1jax.telemetry.cost import Work
from d1jax.training.programs import Programs


def work(experiment: Experiment, programs: Programs, width: int) -> dict[str, Work]:
  """FLOPs of one run of each program, on all devices together.

  Rollouts take every step: where confidence or stop ids end them early, this is the most that they can take.

  Args:
    experiment: network and configuration.
    programs: of an iteration.
    width: of the prompts.
  """
  config, weights, sampler = experiment.config, experiment.model.weights, experiment.sampler
  size, lora, section = weights.network.size, weights.lora, config.grpo
  model = cost.Model(size, lora, weights.merges, config.model.remat, experiment.model.denoiser.shift)
  canvas, chunks = width + sampler.completion_length, section.rollout_chunks
  rows = section.oversample * section.prompts_per_iteration * section.num_generations // chunks
  reach, tiled = cost.whole(sampler, chunks, rows), section.logits_tile is not None
  score, step = cost.update(model, sampler, programs.method, canvas, reach, tiled=tiled, oversample=section.oversample)
  merged = 0
  if lora is not None and weights.merges:
    sides = flops.projections(size)
    merged = 2 * size.layers * lora.rank * sum(sides[name][0] * sides[name][1] for name in lora.targets)
  return {
    "publish": Work(merged, 0),
    "rollout": cost.rollout(model, sampler, canvas, cost.whole(sampler, 1, rows)),
    "update": Work(score.flops + step.flops, step.tokens, score.repeated + step.repeated),
  }
