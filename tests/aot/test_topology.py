import importlib.util

import jax
import pytest

from d1jax.aot import topology
from d1jax.errors import RunError
from d1jax.parallel import chips
from tests.aot import programs


@pytest.mark.parametrize(
  ("name", "count", "kind"),
  [
    ("v5e:1x1", 1, "TPU v5 lite"),
    ("v5e:2x4", 8, "TPU v5 lite"),
    ("v5p:2x2x4", 16, "TPU v5"),
    ("v6e:4x4", 16, "TPU v6 lite"),
  ],
)
def test_chips_of_a_topology(name, count, kind):
  programs.devices("v5e:2x4")  # skips without the compiler
  found = topology.devices(name)
  assert len(found) == count
  assert {device.device_kind for device in found} == {kind}
  assert chips.of(kind) is not None


def test_slices():
  programs.devices("v5e:2x4")
  found = topology.devices("v5e:2x2", 2)
  assert [device.slice_index for device in found] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name", ["v5e:3x5", "v9:2x2", "nonsense"])
def test_an_unknown_topology_is_one_line(name):
  programs.devices("v5e:2x4")
  with pytest.raises(RunError, match=f"config.topology={name} with config.slices=1 is no topology") as failure:
    topology.devices(name)
  assert "\n" not in str(failure.value)


def test_without_the_compiler_the_remedy_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RunError, match=rf'v5e:2x4 needs .* pip install "jax\[tpu\]=={jax.__version__}"'):
    topology.devices("v5e:2x4")
