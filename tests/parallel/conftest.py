import importlib.util

import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from d1jax.parallel import attention as kernels


@pytest.fixture
def interpreted(monkeypatch):
  """Splash attention on the CPU; counts the kernels."""
  made = []
  make = kernels.splash.make_splash_mha

  def interpreted_kernel(mask, **options):
    made.append(mask.shape)
    return make(mask, interpret=True, **options)

  monkeypatch.setattr(kernels.splash, "make_splash_mha", interpreted_kernel)
  return made


@pytest.fixture
def cudnn_found(monkeypatch):
  """Programs with cuDNN's calls can be lowered on a machine without it."""
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


SLOW = pytest.mark.slow(reason="the TPU's compiler, for one more kind of chip")
KINDS = ["v5e:2x2", pytest.param("v5p:2x2x1", marks=[SLOW, pytest.mark.long]), pytest.param("v6e:2x2", marks=SLOW)]


@pytest.fixture(scope="module", params=KINDS)
def tpu(request):
  """Four TPUs of a kind, to compile for."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: tests/requirements.txt names the one that goes with this JAX")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no machine to ask what it is
    patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    yield topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices
