"""The reader's promise: no more of a folder is held than what is loaded and a piece of a tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models import folders

pytestmark = pytest.mark.slow(reason="writes and reads gigabytes of weights")

ROOT = Path(__file__).parents[2]
SIZE = dict(vocab=4096, embed=2048, heads=16, kv_heads=16, head_size=128, mlp=2048, layers=11)
SHARDS = 9
MIB = 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """A LLaDA of more than 1 GiB in float32, written a file at a time; the folder, and its largest tensor's bytes."""
  folder = tmp_path_factory.mktemp("large")
  (folder / "config.json").write_text(json.dumps(folders.CONFIGS["llada"](SIZE, "float32")), encoding="utf-8")
  shapes = folders.llada_shapes(SIZE)
  homes = {name: f"model-{i % SHARDS:05d}.safetensors" for i, name in enumerate(sorted(shapes))}
  some = np.random.default_rng(0).random(MIB, np.float32)
  for file in sorted(set(homes.values())):
    mine = [name for name, home in homes.items() if home == file]
    tensors = {name: np.resize(some, shapes[name]) for name in mine}
    save_file(tensors, folder / file, metadata={"format": "pt"})
  index = {"metadata": {}, "weight_map": homes}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
  bytes_of = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
  assert sum(bytes_of.values()) >= 2**30
  yield folder, max(bytes_of.values())
  for path in folder.iterdir():
    path.unlink()


@pytest.mark.parametrize("devices", [1, 8])
def test_peak_memory_is_the_arrays_and_a_tensor(large, tmp_path, devices, capsys):
  if not Path("/proc/self/clear_refs").exists():
    pytest.skip("no /proc/self/clear_refs: the peak cannot be reset on this system")
  folder, largest = large
  folders.write(tmp_path / "tiny", "llada")
  command = [sys.executable, "-m", "tests.models.peak", str(tmp_path / "tiny"), str(folder), str(devices)]
  # glibc keeps what is freed for itself, up to 200 MiB here; blocks of more than 1 MiB are to go back, so that the peak
  # is what the reader holds.
  environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  with capsys.disabled():
    mib = {name: {k: v // MIB for k, v in found[name].items()} for name in ("before", "after")}
    print(f"\n{devices} devices: arrays {found['arrays'] // MIB} MiB, excess {found['excess'] / MIB:.0f} MiB, {mib}")
  assert found["arrays"] >= 2**30
  assert found["excess"] <= largest + 128 * MIB
