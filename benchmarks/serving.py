"""What serving costs: a batch that requests join and leave, against `d1jax.generate`.

`python -m benchmarks.serving` asks for completions of random prompts: `generate` is called with one prompt after the
other, and with a batch that is full from the beginning to the end (`static`); then so many clients send requests to the
engine at once, each the next one when the last is answered. No completion ends early, so that all compute the same. The
arms take turns. It prints a JSON line an arm: tokens a second, and seconds to the first block and to the completion,
medians over all rounds; and the ratios that the engine is held to.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import queue
import statistics
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import d1jax
from benchmarks import case as cases
from benchmarks import timing
from benchmarks.case import CASES, Case
from d1jax.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.model import Model, from_scratch
from d1jax.serving.engine import Engine, Request, Update

Send = Callable[[int], Iterator[int]]
"""Sends the request of this number, and yields how many tokens of its answer are final, at each update."""

TEMPERATURE = 0.9


class Load(NamedTuple):
  """What clients saw.

  Attributes:
    tokens_per_second: of all.
    processor_milliseconds: of this process, a token: on a CPU that others use too, it says more than the seconds do.
    first: seconds to the first block of each request, but for the first one of each client: all clients begin at the
      same moment, and later requests meet no such crowd.
    whole: seconds to the end of the same requests.
  """

  tokens_per_second: float
  processor_milliseconds: float
  first: list[float]
  whole: list[float]


class Stopwatch:
  """Measures tokens a second, and a token's milliseconds of all cores."""

  def __init__(self) -> None:
    self.began, self.worked = time.perf_counter(), time.process_time()

  def load(self, tokens: int, first: list[float], whole: list[float]) -> Load:
    """What was measured for so many tokens."""
    seconds, worked = time.perf_counter() - self.began, time.process_time() - self.worked
    return Load(tokens / seconds, 1e3 * worked / tokens, first, whole)


def load(send: Send, clients: int, requests: int) -> Load:
  """Lets so many clients send requests, each the next one when its last is answered."""
  numbers, tokens = iter(range(requests)), [0] * requests
  first, whole = [0.0] * requests, [0.0] * requests
  lock = threading.Lock()

  def client() -> None:
    while True:
      with lock:
        number = next(numbers, None)
      if number is None:
        return
      began = time.perf_counter()
      for known in send(number):
        if known and not tokens[number]:
          first[number] = time.perf_counter() - began
        tokens[number] = known
      whole[number] = time.perf_counter() - began

  threads = [threading.Thread(target=client) for _ in range(clients)]
  watch = Stopwatch()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  later = clients if requests > clients else 0
  return watch.load(sum(tokens), first[later:], whole[later:])


def build(case: Case, block: int | None) -> Model:
  """A model with random weights, whose completions have no end."""
  tokenizer = SentencePieceTokenizer(train_sentencepiece([string.printable], model_type="char", vocab_size=200))
  model = from_scratch(case.size, tokenizer, dtype=case.dtype, block=block)
  endless = dataclasses.replace(model.rollout_denoiser, stop_ids=())
  return dataclasses.replace(model, denoiser=endless, rollout_denoiser=endless)


def prompts(model: Model, case: Case, number: int) -> list[str]:
  """Random texts of the case's length, a start token included."""
  draw, letters = np.random.default_rng(0), list(string.ascii_letters)
  assert model.tokenizer is not None
  extra = len(model.tokenizer.prompt([{"role": "user", "content": "a"}], "")) - 1
  return ["".join(draw.choice(letters, case.prompt - extra)) for _ in range(number)]


def sender(engine: Engine, model: Model, texts: list[str], spec: SamplerSpec) -> Send:
  """Sends to the engine of this process."""
  assert model.tokenizer is not None
  encode = model.tokenizer.prompt
  asked = [np.asarray(encode([{"role": "user", "content": text}], ""), np.int32) for text in texts]

  def send(number: int) -> Iterator[int]:
    heard: queue.SimpleQueue[Update] = queue.SimpleQueue()
    engine.submit(Request(asked[number % len(asked)], spec, seed=number), heard.put)
    while True:
      update = heard.get()
      yield update.known
      if update.reason:
        return

  return send


def generated(model: Model, texts: list[str], spec: SamplerSpec, batch: int, bucket: int) -> Load:
  """Calls `d1jax.generate` with batches of so many prompts, one after the other."""
  watch, whole = Stopwatch(), []
  for first in range(0, len(texts), batch):
    start = time.perf_counter()
    part = texts[first : first + batch]
    d1jax.generate(model, part, spec=spec, batch_size=batch, prompt_buckets=(bucket,))
    whole += [time.perf_counter() - start] * len(part)
  return watch.load(len(texts) * spec.completion_length, whole, whole)


def line(name: str, rounds: list[Load]) -> dict[str, Any]:
  """What is printed of an arm."""
  first, whole = (sorted(itertools.chain(*column)) for column in list(zip(*rounds, strict=True))[2:])
  at = lambda values, share: values[min(int(share * len(values)), len(values) - 1)]
  return {
    "arm": name,
    "tokens_per_second": statistics.median(one.tokens_per_second for one in rounds),
    "processor_milliseconds_per_token": statistics.median(one.processor_milliseconds for one in rounds),
    "first_block_p50": at(first, 0.5),
    "first_block_p95": at(first, 0.95),
    "completion_p50": at(whole, 0.5),
    "completion_p95": at(whole, 0.95),
  }


def ratios(rounds: dict[str, list[Load]], clients: Sequence[int]) -> dict[str, float]:
  """The engine at each number of clients against the full batch, and four clients against one: medians."""

  def median(numerator: str, denominator: str, value: Callable[[Load], float]) -> float:
    pairs = zip(rounds[numerator], rounds[denominator], strict=True)
    return statistics.median(value(a) / value(b) for a, b in pairs)

  found = {}
  for number in clients:
    arm = f"{number} clients"
    found[f"throughput_of_{number}_clients_to_static"] = median(arm, "static", lambda x: x.tokens_per_second)
    found[f"processor_time_of_static_to_{number}_clients"] = median("static", arm, lambda x: x.processor_milliseconds)
  if {"1 clients", "4 clients"} <= set(rounds):
    found["first_block_of_4_clients_to_1"] = median("4 clients", "1 clients", lambda x: statistics.median(x.first))
  return found


def main() -> None:
  """Measures all arms of a case."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--case", choices=CASES, help="default: mid on a CPU, else llada_8b")
  parser.add_argument("--clients", nargs="*", type=int, default=[1, 4, 16, 64])
  parser.add_argument("--each", type=int, default=3, help="requests of a client; a single one sends four times as many")
  parser.add_argument("--slots", type=int, default=16, help="rows of the engine, and of a static batch")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--block", type=int, help="of a block-causal network; default: full attention")
  options = parser.parse_args()
  name = options.case or cases.default_case()
  case = CASES[name]
  model = build(case, options.block)
  spec = SamplerSpec(case.completion, case.steps, options.block or case.block, TEMPERATURE)
  texts = prompts(model, case, options.slots)
  engine = Engine(
    model,
    slots=options.slots,
    lengths=(case.canvas,),
    block_length=spec.block_length,
    queue=max(*options.clients, 1),
  )
  engine.prepare()
  send = sender(engine, model, texts, spec)
  arms: dict[str, Callable[[], Load]] = {
    "generate": lambda: generated(model, texts[:4], spec, 1, case.prompt),
    "static": lambda: generated(model, texts, spec, options.slots, case.prompt),
  }
  for clients in options.clients:
    requests = options.each * (4 if clients == 1 else clients)
    arms[f"{clients} clients"] = functools.partial(load, send, clients, requests)
  for text in (texts[:1], texts):  # compiles
    generated(model, text, spec, len(text), case.prompt)
  print(json.dumps({"case": name, **cases.described(case), **timing.machine(1), **vars(options)}), flush=True)
  rounds: dict[str, list[Load]] = {arm: [] for arm in arms}
  for _ in range(options.rounds):
    for arm, run in arms.items():
      rounds[arm].append(run())
  for arm, found in rounds.items():
    print(json.dumps(line(arm, found)), flush=True)
  print(json.dumps(ratios(rounds, options.clients) | engine.gauges()), flush=True)
  engine.close()


if __name__ == "__main__":
  main()
