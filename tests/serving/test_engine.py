"""The engine: what it answers is what `d1jax.generate` does, whoever runs beside it; nobody harms anybody else."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import d1jax
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.parallel.mesh import make_mesh
from d1jax.serving.engine import BusyError, Engine, Request
from d1jax.serving.lane import how_many, sizes_of
from tests import hub

DRAWN = SamplerSpec(completion_length=16, diffusion_steps=8, block_length=8, temperature=1.0, early_exit=True)
GREEDY = dataclasses.replace(DRAWN, temperature=0.0, block_length=4, completion_length=8)
SURE = dataclasses.replace(DRAWN, schedule="threshold", threshold=0.05, max_reveal=3)
TEXTS = ["1 + 1 = ?", "Why?", "Name three rivers of it.", "b", "What is the time?"]


class Heard:
  """A listener, and what it heard."""

  def __init__(self, act=lambda update: None):
    self.updates, self.over, self.act = [], threading.Event(), act

  def __call__(self, update):
    self.updates.append(update)
    if update.reason:
      self.over.set()
    self.act(update)

  @property
  def last(self):
    assert self.over.wait(300)
    return self.updates[-1]


def ids(model, text):
  return np.asarray(model.tokenizer.prompt([{"role": "user", "content": text}], ""), np.int32)


def asked(model, text, spec=DRAWN, **options):
  return Request(ids(model, text), spec, **options)


def answer(engine, request):
  heard = Heard()
  engine.submit(request, heard)
  return heard.last


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("hub")
  return {family: hub.write(root / family, family, dtype="float32") for family in ("llada", "dream")}


@pytest.fixture(scope="module")
def model(folders):
  return d1jax.from_pretrained(folders["llada"], jnp.float32)


@pytest.fixture(scope="module")
def engine(model):
  engine = Engine(model, slots=2, lengths=(104, 52), block_length=8, queue=32)
  assert not engine.ready
  lines = []
  engine.prepare(lines.append)
  assert engine.ready
  assert lines == [f"{rows} of {length} tokens" for length in (52, 104) for rows in ("1 row", "2 rows")]
  yield engine
  engine.close()


def same(found, expected, atol=1e-6):
  """Log-probabilities of programs for other numbers of rows are rounded otherwise (`tests.diffusion.test_slots`)."""
  for name in ("tokens", "reveal_step", "known", "reason"):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  np.testing.assert_allclose(found.reveal_logp, expected.reveal_logp, rtol=0, atol=atol)


def check_against_generate(engine, model, specs, texts=TEXTS, samples=2):
  """All at once; token for token up to the end; then one of them alone."""
  requests = [asked(model, t, spec, seed=5, sample=n) for spec in specs for n in range(samples) for t in texts]
  heard = [Heard() for _ in requests]
  for request, listen in zip(requests, heard, strict=True):
    engine.submit(request, listen)
  for request, listen in zip(requests, heard, strict=True):
    found = listen.last
    assert found.reason in ("stop", "length")
    if request.sample and not request.spec.temperature:
      continue
    text = next(text for text in texts if np.array_equal(ids(model, text), request.prompt))
    options = dict(spec=request.spec, seed=5, samples=1 if not request.spec.temperature else samples)
    expected = d1jax.generate(model, [text], **options)[request.sample]
    assert found.known == expected.length
    np.testing.assert_array_equal(found.tokens[: found.known], expected.tokens[: expected.length])
    np.testing.assert_array_equal(found.reveal_step[: found.known], expected.reveal_step[: expected.length])
  same(answer(engine, requests[-1]), heard[-1].last)


def test_what_generate_draws_whoever_runs_beside_it(engine, model):
  check_against_generate(engine, model, [DRAWN, GREEDY])
  gauges = engine.gauges()
  assert gauges["running"] == gauges["waiting"] == 0
  assert gauges["slots"] == 4
  assert min(gauges[name] for name in ("requests", "tokens", "passes", "token_forwards")) > 0


@pytest.mark.slow(reason="compiles engines and rollouts of their own")
@pytest.mark.parametrize(("family", "block"), [("dream", None), ("llada", 8), ("dream", 8)])
def test_what_generate_draws_with_other_networks(folders, family, block):
  model = d1jax.from_pretrained(folders[family], jnp.float32, block=block)
  engine = Engine(model, slots=3, lengths=(96,), block_length=8)
  engine.prepare()
  short = dataclasses.replace(SURE, block_length=4, diffusion_steps=16)
  check_against_generate(engine, model, [DRAWN, short], TEXTS[:3], samples=1)
  engine.close()


@pytest.mark.slow(reason="compiles for eight devices")
@pytest.mark.parametrize(("block", "sizes"), [(None, dict(data=2, fsdp=2, tensor=2)), (8, dict(data=8))])
def test_a_mesh_changes_no_token(folders, block, sizes):
  found = []
  for mesh in (None, make_mesh(sizes, jax.devices())):
    model = d1jax.from_pretrained(folders["llada"], jnp.float32, block=block, mesh=mesh)
    engine = Engine(model, slots=3, lengths=(64,), block_length=8)
    engine.prepare()
    heard = [Heard() for _ in TEXTS]
    for text, listen in zip(TEXTS, heard, strict=True):
      engine.submit(asked(model, text), listen)
    found.append([listen.last for listen in heard])
    engine.close()
  for one, other in zip(*found, strict=True):
    same(one, other, atol=1e-5)


def test_nothing_is_compiled_for_a_request(engine, model):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if "compile" in name or "trace" in name else None
  )
  heard = [Heard() for _ in range(6)]
  specs = [SURE, dataclasses.replace(DRAWN, temperature=0.3, remasking="random"), GREEDY]
  for number, listen in enumerate(heard):
    engine.submit(asked(model, TEXTS[number % 5], specs[number % 3], seed=number), listen)
  assert all(listen.last.reason != "error" for listen in heard)
  assert compiled == []


def test_a_finished_block_never_changes(engine, model):
  heard = Heard()
  engine.submit(asked(model, TEXTS[2], dataclasses.replace(DRAWN, completion_length=24, diffusion_steps=12)), heard)
  last = heard.last
  assert [update.known for update in heard.updates[:-1]] == [8, 16][: len(heard.updates) - 1]
  for update in heard.updates:
    np.testing.assert_array_equal(update.tokens[: update.known], last.tokens[: update.known])
    open_ = update.tokens == model.denoiser.mask_id
    assert not open_[: update.known].any()
    np.testing.assert_array_equal(update.reveal_step < 0, open_)
    assert (update.reveal_logp[open_] == 0).all()


def test_a_canvas_is_shown_step_by_step(engine, model):
  blocks, steps = Heard(), Heard()
  engine.submit(asked(model, TEXTS[0]), blocks)
  engine.submit(asked(model, TEXTS[0], every_step=True), steps)
  same(steps.last, blocks.last)
  taken = [int((update.reveal_step >= 0).sum()) for update in steps.updates]
  assert taken == [2 * (n + 1) for n in range(len(taken))]


def test_a_cancelled_request_keeps_what_it_has(engine, model):
  ticket, given = [], threading.Event()

  def cancel(update):
    given.wait(60)
    ticket[0].cancel()

  heard = Heard(cancel)
  ticket.append(engine.submit(asked(model, TEXTS[0], every_step=True), heard))
  given.set()
  assert (heard.last.reason, heard.last.known) == ("cancelled", 0)
  assert (heard.last.reveal_step >= 0).sum() == 2
  ticket[0].cancel()
  assert answer(engine, asked(model, TEXTS[1])).reason in ("stop", "length")
  assert len(heard.updates) == 2


def test_a_late_request_ends_where_it_is(engine, model):
  heard = Heard(lambda update: update.reason or threading.Event().wait(0.6))
  engine.submit(asked(model, TEXTS[0], every_step=True, deadline=0.5), heard)
  assert heard.last.reason == "deadline"
  assert 0 < (heard.last.reveal_step >= 0).sum() < 16
  assert answer(engine, asked(model, TEXTS[0], deadline=1e-9)).reason == "deadline"


def test_a_listener_that_fails_ends_its_own_request(engine, model):
  def fail(update):
    raise RuntimeError("gone")

  bad, good = Heard(fail), Heard()
  engine.submit(asked(model, TEXTS[0], dataclasses.replace(DRAWN, completion_length=24, diffusion_steps=12)), bad)
  engine.submit(asked(model, TEXTS[1]), good)
  assert good.last.reason in ("stop", "length")
  assert len(bad.updates) == 1
  assert engine.gauges()["running"] == 0


def test_an_error_in_a_step_answers_its_requests_and_the_engine_goes_on(engine, model, monkeypatch):
  expected = answer(engine, asked(model, TEXTS[0]))
  with monkeypatch.context() as patch:

    def fail(*_):
      raise RuntimeError("no memory")

    for lane in engine._lanes:
      patch.setattr(lane, "advance", fail)
    failed = answer(engine, asked(model, TEXTS[0]))
    assert (failed.reason, failed.message) == ("error", "a denoising step failed: RuntimeError")
  same(answer(engine, asked(model, TEXTS[0])), expected)


def test_a_full_queue_is_busy(engine, model, monkeypatch):
  monkeypatch.setattr(engine, "_most_waiting", 2)
  begun, go = threading.Event(), threading.Event()

  def hold(update):
    begun.set()
    go.wait(60)

  heard = [Heard(hold), Heard(), Heard()]
  engine.submit(asked(model, TEXTS[0], every_step=True), heard[0])
  assert begun.wait(60)
  waiting = [engine.submit(asked(model, TEXTS[1]), listen) for listen in heard[1:]]
  with pytest.raises(BusyError, match="2 requests wait, the most that may") as busy:
    engine.submit(asked(model, TEXTS[2]), Heard())
  assert 1 <= busy.value.retry_after <= 60
  assert engine.gauges()["waiting"] == 2
  earlier = waiting[0].queued_seconds
  go.set()
  assert all(listen.last.reason in ("stop", "length") for listen in heard)
  assert earlier < waiting[0].queued_seconds == waiting[0].queued_seconds


@pytest.mark.parametrize(("drain", "reasons"), [(None, {"stop", "length"}), (0.0, {"cancelled"})])
def test_a_closed_engine_ends_what_was_asked(model, drain, reasons):
  engine = Engine(model, slots=1, lengths=(52,), block_length=8)
  held, heard = threading.Event(), [Heard(lambda update: held.wait(60)), Heard()]
  for listen in heard:
    engine.submit(asked(model, TEXTS[0], every_step=True), listen)
  engine.prepare()
  closing = threading.Thread(target=engine.close, args=(drain,))
  closing.start()
  if drain is not None:
    closing.join(0.5)
  held.set()
  assert {listen.last.reason for listen in heard} <= reasons
  closing.join(60)
  with pytest.raises(BusyError, match="the engine is closing"):
    engine.submit(asked(model, TEXTS[0]), Heard())


def test_an_engine_that_never_ran_can_be_closed(model):
  engine, heard = Engine(model, lengths=(52,)), Heard()
  engine.submit(asked(model, TEXTS[0]), heard)
  engine.close()
  assert heard.last.reason == "cancelled"


REFUSED = [
  (dict(prompt=np.zeros(0, np.int32)), "prompt has no token"),
  (dict(prompt=np.asarray([3, 264], np.int32)), "prompt has ids outside of 0 to 263"),
  (
    dict(prompt=np.zeros(90, np.int32)),
    "prompt has 90 tokens, which with completion_length=16 need 106; the longest canvas has 104: shorten the prompt",
  ),
  (dict(seed=-1), "seed"),
  (dict(seed=1 << 32), "seed is 4294967296; give one below 4294967296"),
  (dict(sample=2048), "sample is 2048; give one below 2048"),
  (dict(deadline=0.0), "deadline is 0.0; give seconds above 0"),
  (dict(spec=dataclasses.replace(DRAWN, block_length=16)), "block_length=16 is beyond 8, the longest block: use 8"),
  (dict(spec=dataclasses.replace(DRAWN, cfg_scale=1.0)), "cfg_scale=1.0 .*: use cfg_scale=0"),
  (dict(spec=dataclasses.replace(DRAWN, cache="dual")), "cache='dual' .*: use cache='none'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_served_is_refused(engine, model, changes, message):
  request = dataclasses.replace(asked(model, TEXTS[0]), **changes)
  for refuse in (engine.check, lambda request: engine.submit(request, Heard())):
    with pytest.raises(ValueError, match=message):
      refuse(request)


def test_batches_grow_by_doubling():
  assert sizes_of(16, 1) == [1, 2, 4, 8, 16]
  assert sizes_of(12, 1) == [1, 2, 4, 8, 12]
  assert sizes_of(1, 1) == [1]
  assert sizes_of(12, 8) == [8, 16]
  assert sizes_of(3, 8) == [8]


MEMORY, COMPUTE, BETWEEN = (
  {1: 1.0, 2: 1.0, 4: 1.1, 8: 1.2},
  {1: 1.1, 2: 2.0, 4: 4.0, 8: 8.0},
  {1: 1.5, 2: 2.0, 4: 4.0, 8: 8.0},
)


@pytest.mark.parametrize(
  ("seconds", "rows", "expected"),
  [
    (MEMORY, 8, 8),
    (MEMORY, 3, 3),
    (COMPUTE, 8, 2),
    (COMPUTE, 4, 1),
    (COMPUTE, 1, 1),
    (BETWEEN, 7, 2),
    (BETWEEN, 4, 2),
    ({8: 1.0}, 5, 5),
  ],
)
def test_as_many_rows_advance_as_pays(seconds, rows, expected):
  assert how_many(seconds, rows) == expected
