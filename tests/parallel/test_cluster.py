import io
import os
import socket
import subprocess
import sys

import pytest

from d1jax.errors import RunError
from d1jax.parallel import cluster
from d1jax.parallel.cluster import bind_address, check_launcher, surroundings

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
  ("environment", "processes"),
  [
    (NO_TPU, 1),
    ({**SLURM, "SLURM_NTASKS": "2"}, 2),
    ({**NO_TPU, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),  # in the batch script itself, before srun
    ({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # a shell inside of an allocation
    ({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, 4),
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


@pytest.mark.parametrize(
  ("name", "others"),
  [
    ("SLURM_NTASKS", SLURM),
    ("SLURM_STEP_NUM_TASKS", {**SLURM, "SLURM_NTASKS": "2"}),
    ("OMPI_COMM_WORLD_SIZE", NO_TPU),
    ("MEGASCALE_NUM_SLICES", {"TPU_WORKER_HOSTNAMES": "t-0,t-1"}),
  ],
)
@pytest.mark.parametrize("value", ["x", "-1", "2.0", "\u00b2", "9" * 40])
def test_a_variable_that_holds_no_number_is_named(name, others, value):
  with pytest.raises(RunError, match=rf"the environment says {name}=.*, which is not a whole number: .*unset {name}$"):
    surroundings({**others, name: value})


def test_a_pod_that_cannot_find_the_others_says_so(monkeypatch):
  monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
  pod = {**NO_TPU, "KUBERNETES_SERVICE_HOST": "h"}
  assert surroundings({**pod, "JOB_COMPLETION_INDEX": "0"})[1] == 1
  with pytest.raises(RunError, match="pip install kubernetes"):
    surroundings({**pod, "JOB_COMPLETION_INDEX": "1"})


def test_processes_of_torchrun_are_not_taken_for_runs_of_their_own():
  for alone in (
    {},
    {"WORLD_SIZE": "1", "RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "1"},
    {"WORLD_SIZE": "", "RANK": ""},
  ):
    check_launcher(alone)
  with pytest.raises(RunError, match=r"WORLD_SIZE=2 and RANK=1.*distributed\.processes=2.*unset WORLD_SIZE and RANK"):
    check_launcher({"WORLD_SIZE": "2", "RANK": "1"})


@pytest.mark.parametrize(
  ("coordinator", "resolved", "mine", "expected"),
  [
    ("127.0.0.1:1234", [], [], "127.0.0.1:1234"),
    ("localhost:1234", [], [], "localhost:1234"),
    ("[::1]:1234", [], [], "[::1]:1234"),
    ("node1:1234", ["10.0.0.5"], ["10.0.0.5"], "10.0.0.5:1234"),
    ("10.0.0.5:1234", ["10.0.0.5"], ["10.0.0.5"], "10.0.0.5:1234"),
    ("node1:1234", ["127.0.1.1", "10.0.0.5"], ["127.0.1.1", "10.0.0.5"], "10.0.0.5:1234"),
    ("node1:1234", ["127.0.1.1"], ["127.0.1.1"], None),  # what Debian calls a host itself: others would not get in
    ("public:1234", ["34.1.2.3"], [], None),  # an address that a router translates
    ("nobody:1234", None, [], None),
  ],
)
def test_the_coordinator_listens_where_it_is_told(monkeypatch, coordinator, resolved, mine, expected):
  def getaddrinfo(host, port, **_):
    if resolved is None:
      raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in resolved]

  class Socket:
    def __init__(self, *_):
      pass

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def bind(self, address):
      if address[0] not in mine:
        raise OSError(99, "Cannot assign requested address")

  monkeypatch.setattr(cluster.socket, "getaddrinfo", getaddrinfo)
  monkeypatch.setattr(cluster.socket, "socket", Socket)
  assert bind_address(coordinator) == expected


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (
      "--nonsense",
      "XLA_FLAGS=--nonsense is not accepted by XLA (Unknown flag in XLA_FLAGS: --nonsense): correct it, or",
    ),
    ("--xla_backend_optimization_level=0", "read"),
  ],
)
def test_a_flag_that_xla_does_not_know_is_named(flags, said):
  """In a process of its own: XLA reads its flags once, and this one has read them."""
  program = (
    "import os; from d1jax.errors import RunError; from d1jax.parallel import cluster\n"
    "try: cluster.check_xla_flags(os.environ); print('read')\nexcept RunError as error: print(error)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=True
  )
  assert done.stdout.startswith(said)
  assert done.stderr == ""
