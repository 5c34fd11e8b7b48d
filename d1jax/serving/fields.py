"""The fields of a request's JSON, read one by one; and errors as OpenAI's JSON."""

import reprlib
from collections.abc import Mapping
from typing import Any

from d1jax.run.limits import Limit


class ApiError(Exception):
  """An answer that is an error, with its status."""

  def __init__(
    self,
    message: str,
    *,
    status: int = 400,
    param: str | None = None,
    code: str | None = None,
    retry_after: float | None = None,
  ):
    """Stores what the client is told.

    `message` is one line that says what to do, `status` that of HTTP, `param` the field of the request, `code` a word
    for programs. After `retry_after` seconds the same request may be answered.
    """
    super().__init__(message)
    self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

  def body(self) -> dict[str, Any]:
    """The JSON of the answer."""
    kind = {429: "rate_limit_error", 403: "permission_error"}.get(self.status)
    kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Fields:
  """The fields of an object that have a value; `prefix` stands before their names in messages."""

  def __init__(self, given: Mapping[str, Any], prefix: str = ""):
    self.given, self._prefix = given, prefix

  def fail(self, name: str, must: str) -> ApiError:
    """The error of a field whose value must be something else."""
    own = self._prefix + name
    return ApiError(f"{own}={shown(self.given[name])} must be {must}", param=own)

  def number(self, name: str, default: Any, limit: Limit) -> Any:
    """A number within a limit; a whole number may be written as a real one, as JavaScript does."""
    value = self.given.get(name)
    if limit.whole and isinstance(value, float) and value.is_integer():
      value = int(value)
    if value is not None and not limit.allows(value):
      raise self.fail(name, str(limit))
    return default if value is None else value

  def flag(self, name: str) -> bool:
    """True or false; false if it is absent."""
    value = self.given.get(name, False)
    if not isinstance(value, bool):
      raise self.fail(name, "true or false")
    return value

  def text(self, name: str, default: str) -> str:
    """A text."""
    value = self.given.get(name, default)
    if not isinstance(value, str):
      raise self.fail(name, "a text")
    return value

  def options(self, name: str) -> "Fields":
    """The fields of an object inside of this one; only flags are known there."""
    value = self.given.get(name, {})
    known = {"stream_options": ("include_usage",), "d1jax": ("canvas",)}[name]
    if not isinstance(value, dict):
      raise self.fail(name, f"an object like {{{known[0]!r}: true}}")
    inner = {key: one for key, one in value.items() if one is not None}
    for key, one in inner.items():
      if key not in known and (key, one) != ("include_obfuscation", False):
        raise ApiError(f"unknown field {shown(key)} of {name}; known: {', '.join(known)}", param=name)
    return Fields(inner, f"{name}.")


def shown(value: Any) -> str:
  """A value in a message: not more of it than a line holds."""
  return " ".join(reprlib.repr(value).split())[:120]
