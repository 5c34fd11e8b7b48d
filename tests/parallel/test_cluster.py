import io

import pytest

from d1jax.parallel import cluster
from d1jax.parallel.cluster import surroundings

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
  ("environment", "processes"),
  [
    (NO_TPU, 1),
    ({**SLURM, "SLURM_NTASKS": "2"}, 2),
    ({**NO_TPU, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),  # in the batch script itself, before srun
    ({**NO_TPU, "OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, 1),  # Colab
    ({"TPU_PROCESS_ADDRESSES": "local"}, 1),  # Kaggle
    ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc,t-2.svc,t-3.svc"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "MEGASCALE_NUM_SLICES": "2"}, 4),
  ],
)
def test_clusters_are_recognised_and_single_hosts_stay_alone(environment, processes):
  assert surroundings(environment)[1] == processes


@pytest.mark.parametrize(
  ("endpoints", "environment", "hosts"),
  [
    ("10.0.0.2", "", 1),
    ("a:1:10.0.0.2,b:2:10.0.0.3", "", 2),
    ("10.0.0.2", "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '4'\n", 4),
    (None, None, 1),
  ],
)
def test_hosts_of_a_tpu_slice_are_counted_from_its_metadata(monkeypatch, endpoints, environment, hosts):
  def answer(request, timeout):
    assert request.get_header("Metadata-flavor") == "Google"
    if endpoints is None:
      raise OSError("no route to host")
    name = request.full_url.rpartition("/")[2]
    return io.BytesIO({"worker-network-endpoints": endpoints, "tpu-env": environment}[name].encode())

  monkeypatch.setattr(cluster.urllib.request, "urlopen", answer)
  assert surroundings({}) == ("the TPU's metadata", hosts)
