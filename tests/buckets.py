"""A bucket in memory, for tests of what may lie in one."""

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class InMemory(MemoryFileSystem):
  """Stands for Google Cloud Storage where `gs://` paths are opened."""

  protocol = ("gcs", "gs")

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").strip("/")


@pytest.fixture
def bucket(monkeypatch):
  """An empty bucket, in memory."""
  monkeypatch.setattr(InMemory, "store", {})
  monkeypatch.setattr(InMemory, "pseudo_dirs", [""])
  fsspec.register_implementation("gcs", InMemory, clobber=True)
  return epath.Path("gs://bucket")
