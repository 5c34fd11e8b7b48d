"""diffu-GRPO whose rollouts do not wait for the last updates: they are drawn ahead, by weights of bounded staleness.

With `off_policy_steps` = k, iteration n trains on the rollout that the weights after max(0, n - k) updates drew: not
older nor newer, however fast either side is: so the same run draws the same completions each time. What corrects for
the older weights is in `d1jax.rl.behaviour`. With k = 1, and W_n for the weights after n updates:

  rollouts   0 by W_0 | 1 by W_0 | 2 by W_1 | 3 by W_2 | ...
  updates               0: W_1   | 1: W_2   | 2: W_3   | ...

With `partial_age` a rollout also leaves rows that go on in later ones (`d1jax.training.partial`), for k = 0 too.

JAX dispatches both programs before either has ended. If rollouts have devices of their own (`rollout_mesh`), the two
run at the same time, and an iteration takes as long as the slower one. One thread of the host controls both sides:
while an update runs, it grades the next rollout, chunk by chunk as it arrives.
"""

import collections
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from d1jax.data.pipeline import PromptBatch
from d1jax.diffusion.rollout import Rollout
from d1jax.parallel import mesh as meshes
from d1jax.parallel import multihost
from d1jax.rl.curriculum import Curriculum
from d1jax.run.workdir import Folder
from d1jax.state import Frozen, TrainState
from d1jax.telemetry.busy import Busy
from d1jax.training import dump
from d1jax.training.grpo import batches, iteration_record
from d1jax.training.host import Grading, Visit, grade_chunks, rewarded
from d1jax.training.partial import Course, Pool
from d1jax.training.programs import Programs


class Drawn(NamedTuple):
  """A rollout that waits for its update.

  Attributes:
    version: the number of updates that the weights which drew it had seen.
    batch: its prompts.
    chunks: its completions, where rollouts place them.
    behaviour: log p under the weights that drew it, chunk by chunk; empty if the method scores none.
    course: of a partial rollout.
    span: when it was drawn, see `Busy.watch`; of a rollout of a checkpoint, the distant past.
  """

  version: int
  batch: PromptBatch
  chunks: tuple[Rollout, ...]
  behaviour: tuple[jax.Array, ...] = ()
  course: Course | None = None
  span: Sequence[float] = (0.0, 0.0)


def abstract_waiting(
  programs: Programs, grading: Grading, seed: int, position: int, curriculum: Curriculum | None = None
) -> list[dict[str, Any]]:
  """Shapes, types and placements of what `Ahead.waiting` gives after `position` iterations.

  Args:
    programs: the programs; nothing is compiled.
    grading: the grading of the training prompts.
    seed: the seed of the order of prompts.
    position: the iterations that were run.
    curriculum: what draws the prompts, as it was then (`Curriculum.restore`); None: each comes once an epoch.
  """
  shape, placement, found = programs.shape, programs.model.replicated, []
  prompts = batches(programs, grading, seed, position, curriculum)
  for batch in itertools.islice(prompts, shape.off_policy_steps):
    chunk = programs.chunk(batch.prompt.shape[1])
    whole = lambda x: jax.ShapeDtypeStruct((shape.rows, *x.shape[1:]), x.dtype, sharding=placement)
    arrays = {"rollout": jax.tree.map(whole, chunk), "version": jax.ShapeDtypeStruct((), np.int32, sharding=placement)}
    if programs.method.scores_behaviour:
      arrays["behaviour"] = whole(chunk.reveal_logp)
    if programs.partial:
      arrays["course"] = meshes.with_placement(programs.partial.traced().out_info[2], placement)
    found.append(arrays)
  if programs.partial:
    found.append({"left": programs.partial.abstract_left(placement)})
  return found


class Ahead:
  """Runs the iterations of the GRPO stage, with `Shape.off_policy_steps` rollouts drawn ahead."""

  def __init__(
    self,
    programs: Programs,
    grading: Grading,
    frozen: Frozen,
    position: int,
    workdir: Folder,
    *,
    seed: int,
    gap_every: int,
    dump_every: int = 0,
    curriculum: Curriculum | None = None,
    waiting: Sequence[dict[str, Any]] = (),
  ):
    """Nothing is drawn yet.

    Args:
      programs: the compiled programs.
      grading: the grading of the training prompts.
      frozen: the base and the reference policy.
      position: the iteration to start at.
      workdir: where rollouts are dumped.
      seed: the seed of the order of prompts.
      gap_every: iterations between measurements of the difference between merged and unmerged adapters.
      dump_every: iterations between dumps; 0: never.
      curriculum: draws the prompts; None: each prompt comes once an epoch.
      waiting: of the checkpoint to start at, see the method of this name.
    """
    self._programs, self._grading, self._frozen, self._workdir = programs, grading, frozen, workdir
    self._gap_every, self._dump_every = gap_every, dump_every
    self._curriculum = curriculum
    self._prompts, self._key = batches(programs, grading, seed, position, curriculum), programs.key()
    self._queue = collections.deque(self._again(arrays) for arrays in waiting if "rollout" in arrays)
    left = [jax.device_get(arrays["left"]) for arrays in waiting if "left" in arrays]
    self._pool = Pool(programs.partial, *left) if programs.partial else None
    self._next = position + len(self._queue)
    self._visit: Visit | None = None
    self._rollouts, self._updates = Busy(), Busy()

  def _again(self, arrays: dict[str, Any]) -> Drawn:
    """A rollout of a checkpoint; the chunks may be others than before."""
    host, batch, parts = jax.device_get(arrays), next(self._prompts), self._programs.shape.chunks
    placement = self._programs.drawn_placement
    leaves = zip(*(np.split(leaf, parts) for leaf in host["rollout"]), strict=True)
    chunks = tuple(meshes.place(Rollout(*each), placement) for each in leaves)
    split = np.split(host["behaviour"], parts) if "behaviour" in host else ()
    behaviour = tuple(meshes.place(each, placement) for each in split)
    return Drawn(int(host["version"]), batch, chunks, behaviour, arrays.get("course"))

  def waiting(self) -> list[dict[str, Any]]:
    """The rollouts that wait, and behind them the rows that are unfinished, as small arrays that every process has
    whole; this waits until all are drawn.

    A checkpoint holds them, because the weights that drew them are gone: with them a run that was killed goes on with
    the bits of the run that was not.
    """

    def whole(drawn: Drawn) -> dict[str, Any]:
      chunks, behaviour = multihost.fetch((list(drawn.chunks), list(drawn.behaviour)))
      arrays = {"rollout": jax.tree.map(lambda *x: np.concatenate(x), *chunks), "version": np.int32(drawn.version)}
      if behaviour:
        arrays["behaviour"] = np.concatenate(behaviour)
      if drawn.course:
        arrays["course"] = multihost.fetch(drawn.course)
      return meshes.place(arrays, self._programs.model.replicated)

    found = [whole(drawn) for drawn in self._queue]
    if self._pool:
      found.append(meshes.place({"left": multihost.fetch(self._pool.left)}, self._programs.model.replicated))
    return found

  def _draw(self, state: TrainState, version: int) -> None:
    """Dispatches the rollouts up to that of iteration `version + off_policy_steps`, by the weights of `state`."""
    programs, params = self._programs, None
    for iteration in range(self._next, version + programs.shape.off_policy_steps + 1):
      params = programs.publish(state, self._frozen) if params is None else params
      if self._pool:
        drawn = Drawn(version, *self._pool(params, self._prompts, self._key, iteration))
      else:
        batch = next(self._prompts)
        placed, number = programs.place(batch, iteration)
        chunks = programs.rollout(params, placed, self._key, number)
        drawn = Drawn(version, batch, chunks, programs.behaviour(params, chunks, self._key, number))
      span = self._rollouts.watch((drawn.chunks, drawn.behaviour))
      self._queue.append(drawn._replace(span=span))
      self._next = iteration + 1

  def _graded(self, metrics: Any = ()) -> Visit:
    """The grades of the first rollout of the queue, for whose completions this waits.

    Processes exchange rewards by a program on all devices. While other programs run, CPUs would mix up the messages of
    both: several processes first wait for everything that was dispatched.

    Args:
      metrics: of the update that runs.
    """

    def settle() -> None:
      if not multihost.alone():
        jax.block_until_ready((metrics, [(drawn.chunks, drawn.behaviour) for drawn in self._queue]))

    if self._visit is None:
      self._visit = grade_chunks(self._grading, self._queue[0].batch.record, self._queue[0].chunks, settle)
    return self._visit

  def __call__(self, state: TrainState, iteration: int) -> tuple[TrainState, dict[str, float]]:
    """One iteration; returns the new state and the record. The old state is donated."""
    programs, began = self._programs, time.perf_counter()
    self._draw(state, iteration)
    seconds = dict.fromkeys(("rollout", "grading"), 0.0)
    if self._visit is None:  # the first iteration of an attempt; later ones graded theirs in the iteration before
      waiting = time.perf_counter()
      arrived = self._graded().arrived
      seconds = {"rollout": arrived - waiting, "grading": time.perf_counter() - arrived}
    drawn, visit = self._queue.popleft(), self._graded()
    self._visit = None
    # Only now: a run that is resumed here grades this rollout again, behind the draw above. So no draw knows it.
    shaped = self._curriculum.learn(drawn.batch.record, visit.solved) if self._curriculum else {}
    rewards, short = rewarded(self._grading.shaping, visit, programs.shape.num_generations, iteration)
    visit = visit._replace(rewards=rewards)
    chunks, behaviour = programs.brought((drawn.chunks, drawn.behaviour))
    updating = time.perf_counter()
    ready = sum(each.span[1] <= updating for each in self._queue)
    state, metrics, advantages = programs.update(state, self._frozen, chunks, visit.rewards, behaviour, iteration)
    update = self._updates.watch(metrics)
    arrived = self._graded(metrics).arrived if self._queue else updating  # no rollout waits with k = 0
    graded = time.perf_counter() if self._queue else updating
    with jax.profiler.TraceAnnotation("update"):
      host_metrics = jax.device_get(metrics)
    done = time.perf_counter()
    # Each moment belongs to one part: to the update while it runs, then to the rollout that is waited for, and to its
    # grading. An update that ends at 3 s, a rollout that arrives at 5 s and is graded at 6 s count 3, 2 and 1 seconds.
    updated = min(update[1], done)
    seconds["update"] = updated - updating
    seconds["rollout"] += max(min(arrived, graded) - updated, 0.0)
    seconds["grading"] += max(graded - max(arrived, updated), 0.0)
    gap = programs.merge_gap(state, self._frozen, chunks[0]) if iteration % self._gap_every == 0 else {}
    if gap:
      seconds["validation"] = time.perf_counter() - done
    figures = {"async/staleness": float(iteration - drawn.version), "async/queue": float(ready)}
    if programs.model.weights.apart:
      sides = {"rollout": self._rollouts, "update": self._updates}
      figures |= {f"async/idle/{name}": side.idle(began, done) for name, side in sides.items()}
    course = jax.device_get(drawn.course)
    taken = course.taken if course else None
    figures |= {name: float(value) for name, value in course.figures.items()} if course else {}
    values = iteration_record(programs, self._grading, drawn.batch, visit, host_metrics, seconds, taken=taken)
    if self._dump_every and iteration % self._dump_every == 0:
      dump.write(self._workdir / "rollouts", iteration, chunks, visit, advantages, behaviour)
    return state, gap | figures | shaped | short | values
