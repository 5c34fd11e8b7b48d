"""Arithmetic expressions: an exact evaluator of + - * / and parentheses, one with Python's rules, a small solver.

Nothing is passed to Python's `eval`: model output can neither run code nor take long.
"""

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

MOST_CHARACTERS = 200
"""Longer expressions are not evaluated; this bounds their depth and the size of numbers too."""

MOST_PYTHON_CHARACTERS = 1000
"""The same limit under Python's rules, about what 256 tokens hold."""

MOST_BITS = 1 << 17
"""Products and powers that may have more bits are not computed under Python's rules: `99**98**97` never ends."""

MOST_NUMBERS = 6
"""The solver's limit; its search grows about thirtyfold with each number."""

_WORD = re.compile(r"0|[1-9][0-9]*|[-+*/()\[\]]")
_SIGNS = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"))
_FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
# 3(4) and (3)(4); it is done before fractions get their parentheses, since 3\frac{1}{2} may be a mixed number.
_PRODUCT = re.compile(r"(?<=[0-9)\]]) ?(?=[(\[])")
_OPERATORS = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "/": operator.truediv,
}
_OPENING = {")": "(", "]": "["}
_RANK = {"(": -1, "[": -1, ")": 0, "]": 0, "+": 1, "-": 1, "*": 2, "/": 2}


def words(text: str) -> list[str]:
  """List the numbers, operators and parentheses of a text in their order, skipping the rest."""
  return _WORD.findall(text)


def translate(text: str) -> str:
  r"""Write LaTeX's signs and fractions, and products such as `3(4)`, as `evaluate` reads them; quadratic time."""
  if "(" in text or "[" in text:
    text = _PRODUCT.sub("*", text)
  if "\\" in text:
    for sign, plain in _SIGNS:
      text = text.replace(sign, plain)
    replaced = 1
    while replaced:
      text, replaced = _FRACTION.subn(r"((\1)/(\2))", text)
  return text


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
  """Compute the exact value of an expression and list the numbers that it uses, in order.

  None for anything but ASCII integers without leading zeros, binary + - * /, parentheses and square
  brackets, and a minus at the start of the whole or of what is in brackets; for more than 200 characters; for a
  division by zero. Other unary signs, `**`, `//`, decimals and numbers joined across blanks are thus
  refused. Operator precedence by two stacks, without recursion.
  """
  text = text.strip()
  if len(text) > MOST_CHARACTERS or not text.isascii():
    return None
  tokens = words(text)
  if "".join(tokens) != "".join(text.split()):
    return None
  values: list[Fraction] = []
  numbers: list[int] = []
  pending = ["("]
  expects_operand = is_start = True
  for word in [*tokens, ")"]:
    if not pending:  # A parenthesis too many has closed the whole.
      return None
    if word == "-" and is_start:  # -3+4 is 0-3+4, and uses the same numbers.
      values.append(Fraction(0))
      expects_operand = False
    is_opening = word in ("(", "[")
    is_start = is_opening
    if expects_operand != (is_opening or word not in _RANK):
      return None
    if is_opening:
      pending.append(word)
    elif expects_operand:
      values.append(Fraction(int(word)))
      numbers.append(int(word))
      expects_operand = False
    else:
      while _RANK[pending[-1]] >= _RANK[word]:
        right = values.pop()
        if pending[-1] == "/" and not right:
          return None
        values.append(_OPERATORS[pending.pop()](values.pop(), right))
      if word in _OPENING:
        if pending.pop() != _OPENING[word]:
          return None
      else:
        pending.append(word)
        expects_operand = True
  return None if pending else (values[0], numbers)


_PYTHON_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_PYTHON_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Pow: operator.pow,
}


def evaluate_as_python(text: str) -> int | float | complex | None:
  """Compute what Python would make of an expression over numbers, with its own integers and floats.

  Beside what `evaluate` accepts: `**`, `//`, signs, decimals. None for anything else (names and calls too), for an
  error, for more than 1000 characters and for integers that may exceed 131,072 bits. The text is parsed, but nothing
  is run.
  """
  if len(text) > MOST_PYTHON_CHARACTERS:
    return None
  values: dict[ast.AST, Any] = {}
  try:
    # Reversed, children come before their parents: no recursion.
    for node in reversed(list(ast.walk(ast.parse(text.lstrip(" \t"), mode="eval").body))):
      if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        values[node] = node.value
      elif isinstance(node, ast.UnaryOp) and type(node.op) in _PYTHON_UNARY:
        values[node] = _PYTHON_UNARY[type(node.op)](values[node.operand])
      elif isinstance(node, ast.BinOp) and type(node.op) in _PYTHON_BINARY:
        left, right = values[node.left], values[node.right]
        if _is_large(node.op, left, right):
          return None
        values[node] = _PYTHON_BINARY[type(node.op)](left, right)
      elif isinstance(node, ast.expr):
        return None
  except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
    return None
  return values[node]


def _is_large(sign: ast.operator, left: Any, right: Any) -> bool:
  """Tell whether a product or power of integers may exceed the limit."""
  if not isinstance(left, int) or not isinstance(right, int):
    return False
  bits = left.bit_length()
  if isinstance(sign, ast.Pow):
    return bits > 1 and bits * right > MOST_BITS
  return isinstance(sign, ast.Mult) and bits + right.bit_length() > MOST_BITS


# A node of the solver: its value and how it is made, ("", value) or (operator, left, right).
_Node = tuple


def solve(nums: Sequence[int], target: int) -> str | None:
  """Find an expression that makes `target` of all the numbers; None if there is none.

  Two numbers at a time become a sum, a product, the larger minus the smaller, or an exact
  quotient, in every order, until one number is left: the rule of the public Countdown set.
  """
  solution = _search([(num, "", None, None) for num in nums], target)
  return None if solution is None else _render(solution)[0]


def _search(nodes: list[_Node], target: int) -> _Node | None:
  if len(nodes) == 2:
    # The innermost loop: look at the numbers before building nodes.
    a, b = nodes[0][0], nodes[1][0]
    if target not in (a + b, a * b, a - b, b - a) and a != b * target and b != a * target:
      return None
  for i, j in itertools.combinations(range(len(nodes)), 2):
    rest = nodes[:i] + nodes[i + 1 : j] + nodes[j + 1 :]
    for node in _combine(nodes[i], nodes[j]):
      if not rest and node[0] == target:
        return node
      solution = _search([*rest, node], target) if rest else None
      if solution is not None:
        return solution
  return None


def _combine(a: _Node, b: _Node) -> Iterator[_Node]:
  large, small = (a, b) if a[0] >= b[0] else (b, a)
  yield a[0] + b[0], "+", a, b
  yield a[0] * b[0], "*", a, b
  yield large[0] - small[0], "-", large, small
  if small[0] and large[0] % small[0] == 0:
    yield large[0] // small[0], "/", large, small


def _render(node: _Node) -> tuple[str, int]:
  """Write a node with few parentheses; also returns the rank of the operator applied last."""
  value, sign, left, right = node
  if not sign:
    return str(value), 3
  rank = _RANK[sign]
  (before, rank_before), (after, rank_after) = _render(left), _render(right)
  if rank_before < rank:
    before = f"({before})"
  if rank_after < rank or (rank_after == rank and sign in "-/"):
    after = f"({after})"
  return f"{before}{sign}{after}", rank
