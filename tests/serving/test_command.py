"""`--config=configs/serve.py`: what it refuses before anything is read or compiled, and a whole life of a server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from d1jax.errors import RunError
from d1jax.serving import command
from tests import QUICK_TO_COMPILE, jobs


def configured(**changes):
  config = jobs.load("serve")
  config.update({"pretrained": str(jobs.START)} | changes)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pretrained": None}, r"nobody to answer: set config\.checkpoint .* or config\.pretrained"),
    ({"port": 70000}, "port=70000 must be a whole number of at least 0 and at most 65535"),
    ({"slots": 0}, "slots=0 must be a whole number of at least 1"),
    ({"queue": 0}, "queue=0 must be a whole number of at least 1"),
    ({"lengths": ()}, "lengths is empty"),
    ({"lengths": (0,)}, "lengths=.0,. must hold numbers"),
    ({"request_seconds": 0.0}, r"request_seconds=0\.0 must be a finite number above 0"),
    ({"drain_seconds": -1.0}, r"drain_seconds=-1\.0 must be"),
    ({"host": "256.0.0.1"}, "host='256.0.0.1' is no address of this machine"),
    ({"host": "192.0.2.1"}, "host='192.0.2.1' is no address of this machine .Cannot assign"),
    ({"api_key_file": "nowhere"}, "nowhere is missing, expected a file"),
    ({"port": 0, "pretrained": "nowhere"}, "nowhere"),
    ({"port": 0, "checkpoint": "nowhere"}, "no checkpoint in nowhere"),
  ],
  ids=str,
)
def test_wrong_settings_are_one_line(monkeypatch, changes, message):
  monkeypatch.setattr(command.app, "build", lambda service: pytest.fail("it serves"))
  with pytest.raises(RunError, match=message) as caught:
    command.run(configured(**changes))
  assert "\n" not in str(caught.value)


def test_a_port_in_use_is_found_before_the_model_is_read(monkeypatch):
  monkeypatch.setattr(command.subject, "load", lambda config: pytest.fail("the model was read"))
  with contextlib.closing(command.listener("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    said = f"port={port} of host=127.0.0.1 cannot be listened on \\(Address already in use\\); choose another with"
    with pytest.raises(RunError, match=said):
      command.run(configured(port=port))


@pytest.mark.parametrize(
  ("content", "mode", "found", "said"),
  [
    (b"secret\n", 0o600, b"secret", ""),
    (b"secret", 0o644, b"secret", "others can read"),
    (b"", 0o600, None, "must hold one key"),
    (b"two words", 0o600, None, "must hold one key"),
    ("schlüssel".encode(), 0o600, None, "must hold one key"),
    (b"\xff", 0o600, None, "is not UTF-8"),
  ],
)  # fmt: skip
def test_the_file_of_a_key(tmp_path, capsys, content, mode, found, said):
  file = tmp_path / "key"
  file.write_bytes(content)
  file.chmod(mode)
  if found is None:
    with pytest.raises(ValueError, match=said):
      command.api_key(str(file))
  else:
    assert command.api_key(str(file)) == found
    assert said in capsys.readouterr().err


def test_a_server_for_other_machines_without_a_key_is_warned_of(monkeypatch, capsys):
  def stop(*arguments):
    raise RunError("enough")

  monkeypatch.setattr(command, "listener", stop)
  with pytest.raises(RunError, match="enough"):
    command.run(configured(host="0.0.0.0"))
  assert capsys.readouterr().err == (
    "warning: whoever reaches host=0.0.0.0 may use this server: set config.api_key_file\n"
  )
  with pytest.raises(RunError, match="enough"):
    command.run(configured())
  assert capsys.readouterr().err == ""


@pytest.mark.slow(reason="a process that compiles and serves")
def test_a_server_lives_from_its_command_to_a_signal(tmp_path):
  flags = [f"--config.pretrained={jobs.START}", "--config.port=0", "--config.slots=2", "--config.lengths=(64,)"]
  line = [sys.executable, "-m", "d1jax.main", "--config=configs/serve.py", *flags]
  environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE, "PYTHONUNBUFFERED": "1"}
  process = subprocess.Popen(
    line, cwd=jobs.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    listening = process.stdout.readline()
    assert listening.startswith("listening on http://127.0.0.1:")
    url = listening.split()[2].rstrip(",")
    assert httpx.get(f"{url}/health").json()["status"] in ("compiling", "ready")
    for said in process.stdout:
      if said.startswith("ready after "):
        break
    assert httpx.get(f"{url}/health").json() == {"status": "ready"}
    body = {"messages": [{"role": "user", "content": "0300413012003420"}], "max_tokens": 16, "block_length": 8}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] > 0
    assert httpx.get(f"{url}/").status_code == 200
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.splitlines()[-1] == "SIGTERM: finishing what runs; a second signal ends at once"
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))):
      pass
  finally:
    process.kill()
