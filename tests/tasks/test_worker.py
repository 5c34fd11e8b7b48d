import os
import pickle
import subprocess
import sys
from pathlib import Path

from d1jax.tasks import build

ROOT = Path(__file__).parents[2]
PARITY = str(ROOT / "tests/tasks/parity_task.py")

PROGRAM = """
import pickle, signal, sys
from d1jax.tasks import worker
task, texts, records = pickle.load(sys.stdin.buffer)
worker.start(task)
grades = worker.grade(texts, records, "strict")
ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
heavy = [name for name in ("jax", "flax", "ml_collections", "d1jax.rl") if name in sys.modules]
sys.stdout.buffer.write(pickle.dumps((grades, ignored, heavy)))
"""


def test_a_worker_holds_a_task_of_a_users_file_and_no_array_library():
  """In a bare process: what it imports for itself is all there is."""
  task = build("parity", module=PARITY)
  records = task.records("test")
  texts = [task.demonstration(r, "terse") if i % 3 else "odd" for i, r in enumerate(records)]
  sent = pickle.dumps((pickle.dumps(task), texts, records))
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", PROGRAM], input=sent, capture_output=True, env=environment, timeout=60)
  assert done.returncode == 0, done.stderr.decode()
  grades, ignored, heavy = pickle.loads(done.stdout)
  assert grades == [task.grade(text, record) for text, record in zip(texts, records, strict=True)]
  assert ignored
  assert not heavy
