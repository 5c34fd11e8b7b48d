#!/usr/bin/env bash
# launch/install.sh EXTRA [PACKAGE...]
#
# Makes .venv with all that d1jax needs on a host; EXTRA is JAX's: tpu, cuda12, cuda13 or cpu. Further packages may
# follow, such as s3fs. pip fetches uv, whose hash it compares; uv brings a Python of its own: the images of TPU hosts
# have an older one than d1jax needs.

set -euo pipefail
cd "$(dirname "$0")/.."
(($# > 0)) || {
  echo "launch/install.sh: which JAX? One of tpu, cuda12, cuda13, cpu" >&2
  exit 2
}
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null ||
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --require-hashes -r launch/uv.txt
[[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
# datasets: GSM8K and others are read from the hub. gcsfs: the work directory may be in a bucket.
uv pip install --quiet --python .venv/bin/python -r requirements.txt "jax[$1]" "datasets>=4" gcsfs "${@:2}"
