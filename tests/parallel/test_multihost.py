import jax
import pytest

from d1jax.parallel.multihost import split_cpu


@pytest.fixture
def updates(monkeypatch) -> list[tuple[str, int]]:
  found: list[tuple[str, int]] = []
  monkeypatch.setattr(jax.config, "update", lambda *setting: found.append(setting))
  return found


def test_the_cpu_is_split(updates, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
  split_cpu(2)
  assert updates == [("jax_num_cpu_devices", 2)]


def test_a_number_set_by_hand_stands(updates, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  split_cpu(2)
  assert updates == []
