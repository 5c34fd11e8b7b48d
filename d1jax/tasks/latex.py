r"""LaTeX answers: what stands in `\boxed{}`, and the string normaliser of MATH's graders."""

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)

# What MATH's normaliser replaces before and after it cuts the units.
_FIRST = (
  *(("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
  *((r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")),
)
_THEN = ((r"\%", ""), (" .", " 0."), ("{.", "{0."))


def last_box(text: str) -> str | None:
  r"""Return the inside of the last `\boxed{...}` or `\fbox{...}` that is closed, or None.

  Of nested boxes the innermost counts; `\{` and `\}` are no braces. Linear time.
  """
  if r"\boxed" not in text and r"\fbox" not in text:
    return None
  pending: list[int] = []  # Where boxes start, and -1 for other braces.
  last, end = -1, -1
  for token in _TOKEN.finditer(text):
    word = token[0]
    if word == "{":
      pending.append(-1)
    elif word == "}":
      start = pending.pop() if pending else -1
      if start > last:
        last, end = start, token.start()
    elif len(word) > 2:
      pending.append(token.end())
  return None if last < 0 else text[last:end]


def normalize(text: str) -> str:
  r"""Bring an answer to a common form by the rules of MATH's graders (Hendrycks et al. 2021), quirks included.

  Dropped: line breaks, `\!`, `\left`, `\right`, degrees, `\$`, `\%`, blanks, a unit in `\text{ ` at the right, a name
  of at most two characters before the only `=`. `tfrac` and `dfrac` become `frac`, `\frac12` and `1/2` become
  `\frac{1}{2}`, `\sqrt3` becomes `\sqrt{3}`, `.5` becomes `0.5` and that alone `\frac{1}{2}`.

  Raises:
    ValueError: where those rules give up: two units, `\frac` or `\sqrt` before nothing, a slash between anything but
      integers.
  """
  for old, new in _FIRST:
    text = text.replace(old, new)
  text, *units = text.split(r"\text{ ")
  if len(units) > 1:
    raise ValueError(f"{len(units)} units in {text[:40]!r}, expected one at most")
  for old, new in _THEN:
    text = text.replace(old, new)
  if text.startswith("."):
    text = "0" + text
  name, *values = text.split("=")
  if len(values) == 1 and len(name) <= 2:
    text = values[0]
  text = _brace_roots(text).replace(" ", "")
  text = _brace_fractions(text)
  return r"\frac{1}{2}" if text == "0.5" else _stack_slash(text)


def _brace_roots(text: str) -> str:
  head, *tails = text.split(r"\sqrt")
  if not all(tails):
    raise ValueError(f"nothing under a root of {text[:40]!r}")
  return head + "".join(r"\sqrt" + (tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}") for tail in tails)


def _brace_fractions(text: str) -> str:
  head, *tails = text.split(r"\frac")
  braced = [head]
  for tail in tails:
    if not tail:
      raise ValueError(f"an empty fraction in {text[:40]!r}")
    if tail[0] != "{":
      if len(tail) == 1:
        return text
      below = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
      tail = f"{{{tail[0]}}}{below}"
    braced.append(tail)
  return r"\frac".join(braced)


def _stack_slash(text: str) -> str:
  above, *below = text.split("/")
  if len(below) != 1:
    return text
  # Python refuses, with a ValueError too, to read thousands of digits.
  numbers = int(above), int(below[0])
  return r"\frac{{{}}}{{{}}}".format(*numbers) if text == "{}/{}".format(*numbers) else text


def boxed_or_whole(text: str) -> str:
  """Return the last box of a text, or all of it without one."""
  box = last_box(text)
  return text if box is None else box
