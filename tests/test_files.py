"""Files that are damaged, hostile or no files at all: one line that names the file."""

import os
import tracemalloc

import pytest

from d1jax import files


def say(call, *arguments, **keywords) -> str:
  with pytest.raises(files.FileError) as caught:
    call(*arguments, **keywords)
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_text_is_read_without_its_byte_order_mark(tmp_path):
  path = tmp_path / "a.json"
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
  assert files.read_text(path) == '{"a": 1}\r\n'
  assert files.read_json(path, dict) == {"a": 1}


def test_a_small_file_takes_little_memory(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"1" * 3_000_000)
  tracemalloc.start()
  try:
    assert files.read_bytes(path) == b"1" * 3_000_000
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
  finally:
    tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_and_never_opened(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "folder").mkdir()
  (tmp_path / "large").write_bytes(b"12345")
  (tmp_path / "latin").write_bytes(b"\xff")
  assert "pipe is no regular file" in say(files.read_bytes, tmp_path / "pipe")
  assert "folder is a folder" in say(files.read_bytes, tmp_path / "folder")
  assert "absent is missing" in say(files.read_bytes, tmp_path / "absent")
  assert "larger than 4 bytes" in say(files.read_bytes, tmp_path / "large", 4)
  assert "latin is not UTF-8 (byte 0" in say(files.read_text, tmp_path / "latin")


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", "not JSON"),
    ('{"a": ', "not JSON"),
    ("[" * 100_000, "nested too deep"),
    ('{"a":' * 100_000, "nested too deep"),
    ('{"a": 1' + "0" * 400 + "}", "a number of 401 digits"),
    ("[]", "is not an object: []"),
    ("null", "is not an object: null"),
    ('{"a": NaN}', "the number NaN, which is not finite"),
    ('{"a": -1e999}', "the number -1e999, which is not finite"),
  ],
)
def test_json_that_is_damaged_or_something_else_is_one_line(text, reason):
  message = say(files.parse_json, text, "x.json", dict, finite=True)
  assert message.startswith("x.json ")
  assert reason in message


def test_numbers_that_a_float_can_hold_are_read():
  assert files.parse_json("[1" + "0" * 39 + ", NaN]", "x")[0] == 10**39


def test_bad_lines_are_for_the_reader_to_judge():
  lines = list(files.json_lines('{"a": "\u2028"}\n\n{"a"\n3\r\n', "f"))
  assert [(number, line) for number, line, _ in lines] == [(1, '{"a": "\u2028"}'), (3, '{"a"'), (4, "3\r")]
  assert lines[0][2] == {"a": "\u2028"}
  assert lines[2][2] == 3
  assert isinstance(lines[1][2], files.FileError)
  assert "f line 3 is not JSON" in str(lines[1][2])


def test_a_folder_to_be_made_may_not_lie_below_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
  files.write_check(tmp_path / "new" / "deep")
  assert "file is a file" in say(files.write_check, tmp_path / "file" / "deep")
  assert "a link to nothing" in say(files.write_check, tmp_path / "dangling")
