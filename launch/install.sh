#!/usr/bin/env bash
# launch/install.sh EXTRA
#
# Makes .venv with all that d1jax needs on a host; EXTRA is JAX's: tpu, cuda12, cuda13 or cpu. It fetches uv, which
# brings a Python of its own: the images of TPU hosts have an older one than d1jax needs.

set -euo pipefail
cd "$(dirname "$0")/.."
(($# == 1)) || {
  echo "launch/install.sh: which JAX? One of tpu, cuda12, cuda13, cpu" >&2
  exit 2
}
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
# gcsfs: the work directory may be in a bucket.
uv pip install --quiet --python .venv/bin/python -r requirements.txt "jax[$1]" gcsfs
