"""The limits of accelerators: memory, arithmetic and links, as their makers state it.

Sources: the pages of each TPU on docs.cloud.google.com/tpu/docs (v5e, v5p, v6e; links are stated for both
directions together, halved here; bandwidth between slices is a pod's over its chips) and v4 (which slices are rings);
NVIDIA's data sheets of A100, H100 and H200 (dense bfloat16; NVLink is stated for both directions together).
"""

import dataclasses
from pathlib import Path

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Torus:
  """How the chips of a TPU slice are wired.

  Attributes:
    axes: dimensions of the torus; each chip has two links along each.
    ring: an axis of a multiple of so many chips closes into a ring. Three axes close together or not at all, because
      such slices are joined from whole cubes.
    slice_bandwidth: bytes/s of one chip to other slices, one way.
  """

  axes: int
  ring: int
  slice_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    name: as people call it.
    hbm_bytes: its memory; of a TPU what programs may take, as its compiler says (libtpu 0.0.42).
    flops: floating-point operations a second of bfloat16 matrix products.
    hbm_bandwidth: bytes/s between memory and cores.
    link_bandwidth: bytes/s of all links to other chips together, one way.
    torus: the wiring; None if a switch connects all chips of a host.
  """

  name: str
  hbm_bytes: int
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  torus: Torus | None = None


_CHIPS = {  # by the name that JAX gives to the device
  "TPU v5 lite": Chip("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, Torus(2, 16, 3.125e9)),
  "TPU v5": Chip("TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, Torus(3, 4, 6.25e9)),
  "TPU v6 lite": Chip("TPU v6e", int(31.25 * GIB), 918e12, 1640e9, 400e9, Torus(2, 16, 12.5e9)),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 40 * GIB, 312e12, 1555e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 80 * GIB, 312e12, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 80 * GIB, 989e12, 3350e9, 450e9),
  "NVIDIA H200": Chip("H200", 141 * 10**9, 989e12, 4800e9, 450e9),
}


def of(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind`; None for a CPU and for what is not listed."""
  return _CHIPS.get(device_kind)


_NVIDIA, _GOOGLE = "0x10de", "0x1ae0"  # makers on the PCI bus
_TPUS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v3, v4, v5p, v5e, v6e, 7x


def attached(root: Path = Path("/")) -> str | None:
  """The accelerator that the machine has, whether or not JAX can use it: `cuda13` or `tpu`, as `make setup JAX=` calls
  it; None if there is none.

  Args:
    root: the root of the file system, whose device files and PCI bus are looked at.
  """
  if any(root.glob("dev/nvidia[0-9]*")):
    return "cuda13"
  if any(root.glob("dev/accel[0-9]*")):
    return "tpu"
  for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
    maker, kind, device = (_line(vendor.with_name(name)) for name in ("vendor", "class", "device"))
    if maker == _NVIDIA and kind.startswith("0x03"):  # a display controller: its sound and switches are others
      return "cuda13"
    if maker == _GOOGLE and device in _TPUS:
      return "tpu"
  return None


def _line(path: Path) -> str:
  try:
    return path.read_text(encoding="ascii", errors="replace").strip()
  except OSError:
    return ""
