"""The tests; how their programs are compiled."""

import sys

QUICK_TO_COMPILE = (
  "--xla_backend_optimization_level=0"
  " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
  " --xla_cpu_parallel_codegen_split_count=1"
)
"""Tests and small jobs mostly compile: LLVM does not optimise, and loops are written directly, not through MLIR."""
if sys.version_info < (3, 12):  # the JAX of newer Pythons does not know this flag
  QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
