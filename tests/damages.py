"""What may happen to a small file of a run."""

DAMAGES = {
  "deleted": lambda path: path.unlink(),
  "empty": lambda path: path.write_bytes(b""),
  "cut": lambda path: path.write_bytes(path.read_bytes()[:9]),
  "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
  "a list": lambda path: path.write_text("[]"),
  "an empty object": lambda path: path.write_text("{}"),
  "null": lambda path: path.write_text("null"),
  "a number": lambda path: path.write_text("3"),
  "another type inside": lambda path: path.write_text(
    '{"validation": "high", "item_handlers": 3, "custom_metadata": {"fingerprint": 1, "config": [], "seconds": "x"}}'
  ),
  "deep": lambda path: path.write_text("[" * 100_000),
  "long numbers": lambda path: path.write_text('{"validation": 1' + "0" * 400 + "}"),
  "a folder": lambda path: (path.unlink(), path.mkdir()),
}
