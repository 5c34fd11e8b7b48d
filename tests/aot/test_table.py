import copy
import re

from d1jax.aot.table import overview, tables
from d1jax.columns import markdown

GIB = 2**30
RESULT = {
  "topology": "v5e:2x4",
  "slices": 1,
  "mesh": {"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1},
  "training": "LoRA rank 128",
  "rows": 96,
  "available": 16 * GIB,
  "fits": True,
  "programs": {
    "rollout": {
      "runs": 2,
      "compile_seconds": 61.7,
      "fits": True,
      "memory": {
        "arguments": {"weights": 4 * GIB, "rest": 0},
        "outputs": GIB // 2,
        "temporaries": 2 * GIB,
        "code": GIB // 8,
        "elsewhere": GIB,
        "total": 7 * GIB + 5 * GIB // 8,
      },
      "flops": 3 * 10**15,
      "repeated": 0,
      "traffic": 10 * GIB,
      "collectives": [{"kind": "all-reduce", "in_loop": True, "count": 12, "bytes": GIB // 4, "seconds": 0.25}],
      "largest_in_loops": [{"count": 12, "kind": "all-reduce", "dtype": "bf16", "dims": [2, 3], "bytes": 12}],
      "weights_in_loop": 0,
      "open_loops": 0,
      "seconds": {"compute": 1.5, "memory": 0.5, "network": 0.25},
      "bound": "compute",
    },
  },
  "iteration": {"seconds": 3.0, "seconds_apart": 3.5, "compute_share": 1.0, "compute_share_apart": 0.857},
}
_ROLLOUT = RESULT["programs"]["rollout"]
RESULT["programs"] = {
  "publish": copy.deepcopy(_ROLLOUT) | {"runs": 1},
  "rollout": _ROLLOUT,
  "update": copy.deepcopy(_ROLLOUT) | {"runs": 1, "bound": "network"},
}


def test_an_overview_is_a_row_a_result():
  lines = markdown(*overview([RESULT, RESULT | {"slices": 2}])).splitlines()
  assert len({line.count("|") for line in lines}) == 1, "as many cells in each row"
  assert len(lines) == 4
  row = "| v5e:2x4 | 1 x 2 x 4 | LoRA rank 128 | 96 | 7.62 | 7.62 | 7.62 | 16.00 | yes | 3.0 - 3.5 | compute, network |"
  assert lines[2] == f"{row} 86% - 100% |"
  assert lines[3].startswith("| v5e:2x4 x 2 |")


def test_tables_hold_every_part():
  text = tables(RESULT)
  said = " ".join(text.split())
  for row in ("4.00 0.50 2.00", "0.12 1.00 7.62 62"):
    assert re.search(rf"rollout {row} (update|Collectives)", said)
  assert "rollout loops all-reduce 12 0.250 0.250" in said
  assert "rollout 2 3.000 0.000 10.0 1.500 0.500 0.250 compute" in said
  assert "rollout: the largest collectives in loops, the longest loop first: all-reduce of bf16[2, 3]." in text
  assert "move the same weights again in each pass of a loop: none." in text
  assert "end by what is drawn" not in text


def test_open_loops_and_moved_weights_are_told():
  result = copy.deepcopy(RESULT)
  result["programs"]["rollout"] |= {"open_loops": 3, "weights_in_loop": 7}
  text = tables(result)
  assert "rollout: 3 loops have no known length and count as one pass" in text
  assert "rollout: collectives that move the same weights again in each pass of a loop: 7." in text


def test_a_refusal_names_buffers():
  result = copy.deepcopy(RESULT) | {"fits": False, "iteration": None}
  largest = [{"bytes": 12 * GIB, "shape": "f32[3,4]", "source": "jit(f)/dot"}]
  result["programs"]["update"] = {"fits": False, "needed": 18 * GIB, "available": 16 * GIB, "largest": largest}
  text = tables(result)
  assert "update does not fit: 18.00 GiB of 16.00. The largest buffers:\n\n- 12.00 GiB: f32[3,4] jit(f)/dot" in text
  assert re.search(r" 7\.62 +7\.62 +18\.00\b", text)
