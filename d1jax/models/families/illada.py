"""iLLaDA-8B (arXiv 2606.25331): LLaDA with Llama's names, grouped heads and a tied head; position i predicts token i.

The defaults of its configuration class are not known to us, so config.json must state every value that is read.
"""

import dataclasses

from d1jax.models.families import llama

FAMILY = dataclasses.replace(
  llama.FAMILY,
  model_type="illada",
  shift=0,
  masked=True,
  defaults={},
  fixed={
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "layer_norm_eps": None,  # a number would make the norms LayerNorms
    "mlp_bias": False,
    "resid_pdrop": 0.0,
  },
)
