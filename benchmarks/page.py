"""Takes the picture of the chat in a browser, `docs/chat.png`.

`python -m benchmarks.page --checkpoint=runs/sft` serves the model of `python -m d1jax.main --config=configs/sft.py`,
opens the server's page in headless Chromium, asks two puzzles with one token a step, and goes back to the middle of the
second answer.
"""

import argparse
import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.browser import MISSING, browser, find

ROOT = Path(__file__).parent.parent
PUZZLES = ("3002000443212000abcdefghijklmnop", "0310140000300140abcdefghijklmnop")
FIELDS = {"steps": "18", "seed": "1"}


@contextlib.contextmanager
def server(checkpoint: str) -> Iterator[str]:
  """Serves a checkpoint, and gives the server's address when it is ready."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "d1jax.main", "--config=configs/serve.py", f"--config.checkpoint={checkpoint}"]
  fields = ["--config.slots=1", "--config.lengths=(128,)", f"--config.port={port}"]
  process = subprocess.Popen([*command, *fields], cwd=ROOT, stdout=sys.stderr)
  address = f"http://127.0.0.1:{port}/"
  try:
    while process.poll() is None:
      with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{address}health") as answer:
        if answer.status == 200:
          break
      time.sleep(0.2)
    else:
      sys.exit("the server has ended; its last line says why")
    yield address
  finally:
    process.terminate()
    process.wait()


def take(program: str, address: str, puzzles: tuple[str, ...]) -> bytes:
  """The picture of a conversation."""
  with browser(program) as page:
    page.look(1100, 560, scale=1.5)
    page.open(address)
    page.wait("document.getElementById('model').textContent !== 'Chat'")
    for name, value in FIELDS.items():
      page.run(f"settings.elements.namedItem('{name}').value = {value}")
    page.run("document.getElementById('remember').checked = false")
    for puzzle in puzzles:
      page.run("document.getElementById('text').focus()")
      page.write(puzzle)
      page.press("Enter")
      page.wait("document.getElementById('stop').hidden && document.querySelectorAll('.replay').length")
    page.run(
      "const slider = [...document.querySelectorAll('.replay input')].at(-1); slider.value = slider.max >> 1;"
      " slider.dispatchEvent(new Event('input')); document.getElementById('text').blur()"
    )
    return page.picture()


def main() -> None:
  """Serves, asks, and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", required=True, help="a run's folder")
  parser.add_argument("--puzzles", nargs="+", default=PUZZLES, help="what is asked")
  parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "chat.png")
  options = parser.parse_args()
  program = find()
  if program is None:
    sys.exit(MISSING)
  with server(str(Path(options.checkpoint).absolute())) as address:
    options.picture.write_bytes(take(program, address, tuple(options.puzzles)))
  print(f"{options.picture}: {options.picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
  main()
