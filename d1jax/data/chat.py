"""Chat templates of Hugging Face folders: Jinja programs that write a conversation as text, run in a sandbox."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from d1jax.data import folder


class _Generation(jinja2.ext.Extension):
  """`{% generation %}`, by which templates mark an assistant's words; the words are written as they are."""

  def __init__(self, environment: jinja2.Environment) -> None:
    super().__init__(environment)
    self.tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
  """Python's `dict`, of which a template gets two functions and not the type."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict[Any, Any]:
    return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
  """Jinja's namespace without names that Python itself calls."""

  def __init__(*args: Any, **kwargs: Any) -> None:
    self, values = args[0], dict(*args[1:], **kwargs)
    for name in values:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: object) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _raise(message: str) -> None:
  raise jinja2.exceptions.TemplateError(message)


def _to_json(
  value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(date: datetime.date) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  """The environment that transformers gives to chat templates, with a clock that stands still."""
  midnight = datetime.datetime.combine(date, datetime.time.min)
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
  given: dict[str, Callable[..., Any]] = {
    "raise_exception": _raise,
    "strftime_now": lambda form: midnight.strftime(form),
  }
  environment.globals.update(given | {"dict": _Dict(), "namespace": _Namespace})
  return environment


def find_template(files: Mapping[str, bytes]) -> tuple[str, str] | None:
  """The source of a folder's chat template and its file; None if the folder has none.

  chat_template.jinja wins over tokenizer_config.json, as in transformers. Of several named templates it is the one
  named `default`.
  """
  name = "chat_template.jinja"
  if name in files:
    return folder.text(files, name), name
  name = "tokenizer_config.json"
  template = folder.parse(files, name).get("chat_template")
  if isinstance(template, list):
    try:
      template = {item["name"]: item["template"] for item in template}
    except (KeyError, TypeError):
      raise ValueError(f"{name}: chat_template is a list without `name` and `template`; fetch the file again") from None
  if isinstance(template, dict):
    if "default" not in template:
      raise ValueError(
        f"{name}: none of the chat templates {sorted(map(str, template))} is named 'default'; give this name to the one"
        " to use, or put it into chat_template.jinja"
      )
    template = template["default"]
  if template is None:
    return None
  if not isinstance(template, str):
    raise ValueError(f"{name}: chat_template is a {type(template).__name__}, expected text; fetch the file again")
  return template, name


def tells_turns(files: Mapping[str, bytes]) -> bool:
  """Whether a folder has a chat template. Without one, a conversation is one text, and a model cannot tell who said
  what.
  """
  return find_template(files) is not None


class ChatTemplate:
  """A conversation written as the model was trained to read it.

  The template is rendered as transformers does it (`apply_chat_template`), exactly as it stands in the folder: it may
  ignore `add_generation_prompt`, as LLaDA's does. It is a program of somebody else's: the sandbox lets it compute text
  and change nothing, and the process that it runs in (`confined`) bounds its time and memory.
  """

  def __init__(self, source: str, tokens: Mapping[str, str | None], *, name: str, date: datetime.date):
    """Compiles a template.

    Args:
      source: the template.
      tokens: the special tokens that it may write (`bos_token`, ...); None and absent ones are written as nothing.
      name: the name of its file, for errors.
      date: what it takes for today, at midnight.

    Raises:
      ValueError: it does not parse.
    """
    self.source = source
    self._name = name
    self._tokens = {role: text for role, text in tokens.items() if text is not None}
    try:
      self._template = _environment(date).from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
      raise ValueError(
        f"{name}: line {error.lineno} of the chat template does not parse ({error.message}); fetch the file again"
      ) from None
    except Exception as error:  # Jinja computes what is constant; too deep a nesting, a division by zero
      raise ValueError(f"{name}: the chat template cannot be read ({_shown(error)}); correct it") from error

  def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """Writes a conversation.

    Args:
      messages: each with a `role` and a `content`.
      add_generation_prompt: whether the template is asked to begin an assistant's turn at the end.

    Raises:
      ValueError: the template refuses the conversation, fails, or tries what the sandbox forbids.
    """
    turns = [dict(message) for message in messages]
    try:
      return self._template.render(
        messages=turns, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._tokens
      )
    except jinja2.exceptions.SecurityError as error:
      raise ValueError(
        f"{self._name}: the chat template does something that is forbidden ({error}); do not trust this folder"
      ) from error
    except Exception as error:
      roles = [message.get("role") for message in messages]
      raise ValueError(
        f"{self._name}: the chat template fails for the roles {roles} ({_shown(error)});"
        " give it a conversation that it knows, or correct it"
      ) from error


def _shown(error: Exception) -> str:
  """An error as a part of a sentence."""
  if isinstance(error, MemoryError):
    return "it needs more memory than is allowed"
  if isinstance(error, RecursionError):
    return "it is nested too deep"
  return f"{type(error).__name__}: {str(error)[:200]}"
