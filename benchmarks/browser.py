"""A headless Chromium: opens a page, runs JavaScript in it, presses keys and takes pictures.

It is driven by the DevTools protocol over two pipes (`--remote-debugging-pipe`), messages of JSON that end with a zero
byte, so that no package and no port is needed.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = f"no Chromium: none of {', '.join(NAMES)} is installed (on Debian, apt-get install chromium)"


def find() -> str | None:
  """The path of a Chromium; None if there is none."""
  return next((found for found in map(shutil.which, NAMES) if found), None)


class Browser:
  """One page of a headless Chromium."""

  def __init__(self, reading: int, writing: int):
    """Takes the ends of the two pipes and opens an empty page."""
    self._reading, self._writing = reading, writing
    self._pending, self._number = b"", 0
    self._session: str | None = None
    self.complaints: list[str] = []
    """What the page's console said: errors, and what the Content-Security-Policy refused."""
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
      self.call(f"{domain}.enable")

  def call(self, method: str, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
    """Calls a method of the protocol and returns its result.

    Raises:
      RuntimeError: the browser refuses.
      TimeoutError: it does not answer in so many seconds.
    """
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._writing, json.dumps(message).encode() + b"\0")
    end = time.monotonic() + timeout
    while True:
      answer = self._next(end)
      if answer.get("id") == self._number:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result
      self._hear(answer)

  def _next(self, end: float) -> dict[str, Any]:
    """The next message of the browser."""
    while b"\0" not in self._pending:
      ready, _, _ = select.select([self._reading], [], [], max(0.0, end - time.monotonic()))
      part = os.read(self._reading, 1 << 16) if ready else b""
      if not part:
        raise TimeoutError("the browser does not answer")
      self._pending += part
    message, _, self._pending = self._pending.partition(b"\0")
    found: dict[str, Any] = json.loads(message)
    return found

  def _hear(self, event: dict[str, Any]) -> None:
    given = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
      detail = given["exceptionDetails"]
      self.complaints.append(detail.get("exception", {}).get("description", detail["text"]))
    elif event["method"] == "Log.entryAdded":
      self.complaints.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")

  def open(self, address: str) -> None:
    """Loads a page and waits until its scripts have run."""
    self.run("window.before = true")
    self.call("Page.navigate", url=address)
    self.wait("!window.before && document.readyState === 'complete'")

  def run(self, script: str) -> Any:
    """The value of a JavaScript expression; a promise is waited for."""
    answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    if "exceptionDetails" in answer:
      raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
    return answer["result"].get("value")

  def wait(self, condition: str, timeout: float = 20) -> None:
    """Waits until a JavaScript expression is true.

    Raises:
      TimeoutError: it is not in so many seconds; the message has the text of the page.
    """
    end = time.monotonic() + timeout
    while not self.run(f"Boolean({condition})"):
      if time.monotonic() > end:
        raise TimeoutError(f"{condition}; the page says: {self.run('document.body.innerText')}; {self.complaints}")
      time.sleep(0.02)

  def write(self, text: str) -> None:
    """Types text where the focus is."""
    self.call("Input.insertText", text=text)

  def press(self, key: str, *, shift: bool = False) -> None:
    """Presses and releases a key; Enter writes a line feed where the page lets it."""
    code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
    more: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
    typed: dict[str, Any] = {"text": "\r"} if key == "Enter" else {}
    self.call("Input.dispatchKeyEvent", type="keyDown", **more, **typed)
    self.call("Input.dispatchKeyEvent", type="keyUp", **more)

  def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1, calm: bool = False) -> None:
    """Sets the size of the window, the colour scheme, and whether the reader prefers less motion."""
    self.call(
      "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600
    )
    features = [
      {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
      {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
    ]
    self.call("Emulation.setEmulatedMedia", features=features)

  def picture(self) -> bytes:
    """The window as a PNG."""
    return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def _moved(descriptor: int) -> int:
  """The same end of a pipe as a descriptor of at least 10, which no redirection of the shell writes over."""
  moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
  os.close(descriptor)
  return moved


@contextlib.contextmanager
def browser(program: str) -> Iterator[Browser]:
  """Starts a Chromium with a new profile, and ends it.

  Args:
    program: its path.
  """
  (theirs_in, ours_out), (ours_in, theirs_out) = (map(_moved, os.pipe()) for _ in range(2))
  with tempfile.TemporaryDirectory() as home:
    flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={home}", "--no-first-run", "--disable-gpu"]
    flags += ["--no-sandbox", "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    # The browser reads from descriptor 3 and writes to 4.
    line = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-', program]
    process = subprocess.Popen(
      [*line, *flags], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
      yield Browser(ours_in, ours_out)
    finally:
      os.close(ours_out)  # which ends it
      try:
        process.wait(20)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
      os.close(ours_in)
