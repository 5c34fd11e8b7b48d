import json

import jax
import pytest

from d1jax import main
from d1jax.aot import command
from d1jax.aot.analysis import Analysis
from d1jax.errors import RunError
from d1jax.parallel import chips
from tests import jobs
from tests.aot import programs
from tests.aot.cases import BLOCK_CASE, LARGE_CASES, SMALL_CASES, Case, read, sizes, summary
from tests.aot.test_table import RESULT

V5E = Case("v5e:2x4", small=True)


@pytest.fixture(scope="module", autouse=True)
def compiler():
  programs.devices("v5e:2x4")  # skips without it


def analysis(config):
  experiment, made, width = command.on_topology(config)
  kind = experiment.model.weights.mesh.devices.flat[0].device_kind
  return Analysis(experiment, made, chips.of(kind), width)


def golden(case):
  if not case.golden().exists():
    pytest.skip(f"no {case.golden()}: write it with python -m tests.aot.make_goldens {case.topology}")
  return read(case.golden())


def assert_same(found, kept):
  """Placements and collectives exactly, bytes within 5%."""
  assert summary(found) == {name: summary(kept)[name] for name in summary(found)}
  for name, size in sizes(found).items():
    assert size == pytest.approx(sizes(kept)[name], rel=0.05, abs=2**17), name


COMPILED = [Case("v6e:4x4", full=True, small=True)]
ALSO_COMPILED = [Case("v5e:4x4", small=True), Case("v5p:2x2x4", full=True, small=True), Case("v6e:16x16", True, True)]
"""With the first one each kind of chip; the large network is compiled for `v5e:2x4`."""


@pytest.mark.slow(reason="the TPU's compiler")
@pytest.mark.parametrize(
  "case",
  [*COMPILED, *(pytest.param(case, marks=pytest.mark.long) for case in ALSO_COMPILED)],
  ids=lambda case: case.name,
)
def test_a_small_network_is_as_kept(case):
  small = analysis(case.config)
  programs = {name: small.program(name) for name in small.tracing}
  assert_same({"placements": small.placements(), "programs": programs}, golden(case))


@pytest.mark.parametrize("case", [case for case in SMALL_CASES if case not in COMPILED], ids=lambda case: case.name)
def test_the_placements_of_a_small_network_are_as_kept(case):
  assert analysis(case.config).placements() == golden(case)["placements"]


@pytest.mark.long
@pytest.mark.slow(reason="the TPU's compiler takes minutes for LLaDA-8B")
def test_the_large_network_is_as_kept():
  """LoRA at d1's batch on eight v5e; for one chip tests/test_real_model.py compiles the update."""
  case = LARGE_CASES[0]
  large, kept = analysis(case.config), golden(case)
  found = {"placements": large.placements(), "programs": {name: large.program(name) for name in kept["programs"]}}
  assert all(program["fits"] for program in found["programs"].values())
  assert found["programs"]["rollout"]["weights_in_loop"] == 0
  assert_same(found, kept)


@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
def test_what_is_kept_of_the_large_network(case):
  """The targets: all that has room for it fits, and rollouts move no weights."""
  kept = golden(case)
  expected = not (case.full and case.chips < 16)
  assert kept["fits"] == expected
  if expected:
    assert kept["programs"]["rollout"]["weights_in_loop"] == 0
    assert kept["programs"]["rollout"]["open_loops"] == 0
    weights = kept["programs"]["rollout"]["memory"]["arguments"]["weights"]
    assert kept["programs"]["publish"]["memory"]["temporaries"] < weights / 2, "moved a layer at a time"
  if case.chips == 256:
    assert kept["iteration"]["compute_share"] >= 0.6


@pytest.mark.parametrize("case", [case for case in SMALL_CASES if not case.full], ids=lambda case: case.name)
def test_an_exact_rollout_moves_no_weights_and_no_more_than_activations(case):
  """[local batch, L, D] at most; nothing where each chip has all weights."""
  kept = golden(case)
  rollout, mesh = kept["programs"]["rollout"], kept["mesh"]
  rows, canvas, embed = kept["rows"] // kept["rollout_chunks"] // mesh["data"] // mesh["fsdp"], 104 + 24, 512
  assert rollout["weights_in_loop"] == 0
  made = {tuple(each["dims"]) for each in rollout["largest_in_loops"]}
  assert made == ({(rows, canvas, embed)} if mesh["tensor"] > 1 else set())


@pytest.mark.slow(reason="the TPU's compiler, once more")
def test_a_cached_rollout_moves_windows():
  """[local batch, W, D] at most in the passes over a window of W."""
  config = V5E.config
  config.rollout.cache = "dual"
  cached = analysis(config).program("rollout")
  assert cached["weights_in_loop"] == 0
  rows, canvas, embed, window = 96 // 2 // 2, 104 + 24, 512, 12
  blocks, steps, layers = 2, 3, 2
  passes = [(each["count"], tuple(each["dims"])) for each in cached["largest_in_loops"]]
  assert passes[0] == (blocks * (steps - 1) * layers, (rows, window, embed))
  assert (blocks * layers, (rows, canvas, embed)) in passes, "a refresh"


@pytest.mark.slow(reason="the TPU's compiler, once more")
def test_a_rollout_in_blocks_is_as_kept():
  """Every step counts, although a block may be complete before its last one, and moves a window alone."""
  found, kept = analysis(BLOCK_CASE.config), golden(BLOCK_CASE)
  rollout = found.program("rollout")
  kept["programs"] = {"rollout": kept["programs"]["rollout"]}
  assert_same({"placements": found.placements(), "programs": {"rollout": rollout}}, kept)
  assert (rollout["weights_in_loop"], rollout["open_loops"]) == (0, 0)
  rows, block, blocks, layers = 96 // 2 // 2, 4, 24 // 4 + 1, 2
  passes = [(each["count"], tuple(each["dims"])) for each in rollout["largest_in_loops"]]
  assert (blocks * layers, (rows, 2 * block, 512)) in passes, "the first step of each block"
  assert (layers, (rows, 104 - block, 512)) in passes, "the prompts"


@pytest.mark.slow(reason="the TPU's compiler, once more")
def test_without_rules_of_their_own_rollouts_move_weights():
  config = V5E.config
  config.rollout_rules = {}
  assert analysis(config).program("rollout")["weights_in_loop"] > 0


@pytest.mark.slow(reason="the TPU's compiler, once more")
def test_a_run_prints_and_writes_what_it_found(tmp_path, capsys):
  config = jobs.load("aot", "tiny")
  config.topology = "v5e:2x2"
  config.output = str(tmp_path / "new" / "found.json")
  result = command.run(config)
  printed = capsys.readouterr().out
  written = json.loads((tmp_path / "new" / "found.json").read_text())
  assert written == json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
  assert written == json.loads(json.dumps(result))
  assert (written["fits"], written["topology"], written["rows"]) == (True, "v5e:2x2", 256)
  for name, found in written["programs"].items():
    memory = found["memory"]
    parts = sum(memory["arguments"].values()) + sum(
      memory[kind] for kind in ("outputs", "temporaries", "code", "elsewhere")
    )
    assert memory["total"] == parts, name
    assert found["compile_seconds"] > 0
    assert f"\n{name} " in printed.split("GiB a chip:")[1]
    assert f"\n{name} takes {memory['total'] / 2**30:.2f} of 15.75 GiB a chip" in printed
  rollout, chip = written["programs"]["rollout"], chips.of("TPU v5 lite")
  assert rollout["seconds"]["compute"] == pytest.approx(rollout["flops"] / 4 / chip.flops)
  assert rollout["seconds"]["memory"] == pytest.approx(rollout["traffic"] / chip.hbm_bandwidth)
  assert rollout["seconds"]["network"] == pytest.approx(sum(each["seconds"] for each in rollout["collectives"]))
  lines = [(found["runs"], found["seconds"]) for found in written["programs"].values()]
  assert [runs for runs, _ in lines] == [1, 4, 1]
  validated = written["evaluation"]
  assert (validated["rows"], validated["width"], validated["fits"]) == (128, 33, True)
  assert "A validation of 128 prompts of 33 tokens needs" in printed
  assert written["iteration"]["seconds"] == pytest.approx(sum(runs * max(line.values()) for runs, line in lines))


def test_what_does_not_fit_ends_with_1_and_says_what_to_change(capsys, monkeypatch):
  """With what the compiler may say of the programs; tests/aot/test_memory.py reads a refusal of its own."""
  largest = [{"bytes": 2**31, "shape": "f32[3,4]", "source": "jit(f)/dot"}]
  refused = {"compile_seconds": 1.0, "fits": False, "needed": 2**35, "available": 2**34, "largest": largest}
  said = RESULT["programs"] | {"rollout": refused, "evaluation": refused | {"rows": 8, "width": 104}}
  monkeypatch.setattr(Analysis, "program", lambda self, name: said[name])
  monkeypatch.setattr(Analysis, "evaluation", lambda self: said["evaluation"])
  with pytest.raises(command.DoesNotFitError) as failure:
    command.run(V5E.config)
  assert failure.value.exit_code == 1
  remedies = "; ".join(f"{name} does not fit: {command.REMEDIES[name]}" for name in ("rollout", "evaluation"))
  assert str(failure.value) == f"v5e:2x4 has 15.75 GiB a chip: {remedies}"
  assert "raise config.grpo.rollout_chunks" in remedies
  printed = capsys.readouterr().out
  assert "rollout does not fit: 32.00 GiB of 16.00" in printed
  found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
  assert (found["fits"], found["iteration"]) == (False, None)
  assert found["programs"]["rollout"] == refused | {"runs": 2}


@pytest.mark.slow(reason="the TPU's compiler, once more")
def test_state_beside_a_program_counts():
  """A chip that has room for a program alone does not fit where the run holds more beside it."""
  tiny = analysis(V5E.config)
  taken = tiny.program("publish")["memory"]
  assert taken["elsewhere"] > 0
  chip = chips.Chip("small", taken["total"] - 1, 1e12, 1e9, 1e8, chips.of("TPU v5 lite").torus)
  experiment, made, width = command.on_topology(V5E.config)
  found = Analysis(experiment, made, chip, width).program("publish")
  assert (found["fits"], found["needed"], found["available"]) == (False, taken["total"], taken["total"] - 1)
  assert found["largest"]


def test_the_programs_know_llada_without_its_files():
  tokenizer = command.stand_in_tokenizer("llada_8b")
  assert (tokenizer.mask_id, tokenizer.stop_ids, tokenizer.pad_id) == (126336, (126081, 126348), 126081)
  assert tokenizer.vocab <= 126464
  config = jobs.load("aot", "llada_8b,gsm8k,v5e")
  config.topology = "v5e:2x4"
  experiment, _, width = command.on_topology(config)
  assert (experiment.model.denoiser.mask_id, experiment.model.denoiser.vocab, width) == (126336, 126464, 200)


def test_slices_share_the_data_axis():
  config = V5E.config
  config.update_from_flattened_dict({"slices": 2, "grpo.prompts_per_iteration": 32})
  experiment, _, _ = command.on_topology(config)
  mesh = experiment.model.weights.mesh
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 4, "sequence": 1}
  assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({}, "config.topology is not set"),
    ({"topology": "v5e:9x9"}, "config.topology=v5e:9x9"),
    ({"topology": "v5e:2x4", "grpo.prompts_per_iteration": 3}, "does not divide"),
    ({"topology": "v5e:2x4", "mesh.fsdp": 3}, "mesh data=-1 fsdp=3 tensor=4 sequence=1"),
  ],
)
def test_a_wrong_setting_is_one_line(fields, reason):
  config = jobs.load("aot", "llada_8b,v5e")
  config.update_from_flattened_dict(fields)
  with pytest.raises(RunError, match=reason) as caught:
    command.run(config)
  assert caught.value.exit_code == 2
  assert "\n" not in str(caught.value)


def test_the_mode_is_known():
  assert main._mode(jobs.load("aot", "llada_8b")) is command.run


def test_an_unknown_chip_is_named(monkeypatch):
  monkeypatch.setattr(chips, "of", lambda kind: None)
  with pytest.raises(RunError, match=r"d1jax\.parallel\.chips does not know TPU v5 lite"):
    command.run(V5E.config)


def test_versions_are_told():
  assert command.compiler().count(".") >= 2
  assert jax.__version__
