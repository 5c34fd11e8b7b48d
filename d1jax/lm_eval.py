"""`python -m d1jax.lm_eval --model d1jax --model_args pretrained=FOLDER --tasks gsm8k`: lm-evaluation-harness.

The harness has no entry points for models of other packages, so that this command registers `d1jax` and then runs the
harness's own command line, with all of its options. In Python: `d1jax.lm_eval.register()`, then
`lm_eval.simple_evaluate("d1jax", ...)`. docs/evaluation.md has the arguments of the model.
"""

import sys

from d1jax import errors

MODEL = "d1jax.harness:D1jaxLM"
"""What the harness loads when the model `d1jax` is asked for."""


def register() -> None:
  """Makes the model `d1jax` known to the harness.

  Raises:
    RunError: the harness is not installed.
  """
  with errors.extra("lm_eval"):
    from lm_eval.api.registry import model_registry
  if "d1jax" not in model_registry:
    model_registry.register("d1jax", target=MODEL)


def main() -> None:
  """Runs the harness's command line; a failure of d1jax is one line on standard error and an exit code."""
  try:
    with errors.extra("lm_eval"):
      import lm_eval.models  # registers its own models, which it does only while none is known
      from lm_eval.__main__ import cli_evaluate
    assert lm_eval.models
    register()
    cli_evaluate()
  except errors.RunError as error:
    print(errors.harmless(f"d1jax: {error}"), file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
  main()
