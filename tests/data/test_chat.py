import datetime
import json
from pathlib import Path

import pytest

from d1jax.data.chat import ChatTemplate, find_template
from tests.data.folders import load_json, shared_tokenizers

GOLDENS = load_json(Path(__file__).parent / "goldens" / "tokenizers.json")
USER = [{"role": "user", "content": "hi"}]
TODAY = datetime.date(2026, 11, 3)


def render(source: str, messages=USER, tokens=None, *, generation: bool = True) -> str:
  template = ChatTemplate(source, tokens or {}, name="chat_template.jinja", date=TODAY)
  return template.render(messages, add_generation_prompt=generation)


def config_with(template) -> dict[str, bytes]:
  return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


@pytest.mark.parametrize("golden", GOLDENS["templates"], ids=lambda golden: golden["source"][:30])
def test_templates_are_rendered_as_transformers_does(golden):
  assert render(golden["source"], golden["messages"]) == golden["text"]


@pytest.mark.parametrize("name", ["dream7b", "llada8b"])
def test_shipped_templates_are_rendered_as_transformers_does(name):
  config = load_json(shared_tokenizers() / name / "tokenizer_config.json")
  for chat in GOLDENS[name.rstrip("78b")]["chats"]:
    text = render(config["chat_template"], chat["messages"], {"bos_token": config["bos_token"]})
    assert text + chat["prefill"] == chat["text"]


def test_llada_s_template_ignores_what_it_is_asked():
  config = load_json(shared_tokenizers() / "llada8b" / "tokenizer_config.json")
  turns = [*USER, {"role": "assistant", "content": "ho"}]
  tokens = {"bos_token": config["bos_token"]}
  asked = render(config["chat_template"], turns, tokens)
  assert asked == render(config["chat_template"], turns, tokens, generation=False)
  assert asked.endswith("ho<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_tokens_are_handed_over_and_absent_ones_are_written_as_nothing():
  source = "{{ bos_token }}{{ eos_token }}{% if pad_token is defined %}pad{% endif %}"
  assert render(source, tokens={"bos_token": "<s>", "eos_token": None}) == "<s>"


def test_the_date_that_is_given_is_written():
  assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "03 Nov 2026 00:00"


def test_a_template_that_refuses_says_why():
  with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template fails .*\['user'\].*no users here"):
    render("{{ raise_exception('no users here') }}")


@pytest.mark.parametrize(
  "source", ["{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ 'a' + 1 }}", "{{ range(10 ** 9) }}", "{% include 'x' %}"]
)
def test_a_template_that_fails_is_a_value_error(source):
  with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template fails"):
    render(source)


@pytest.mark.parametrize(
  "source",
  [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ strftime_now.__globals__.keys() }}",
    "{{ raise_exception.__code__.co_code }}",
    "{% set ns = namespace(__html__=1) %}",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    "{{ '{0.__class__.__name__}'.format(messages) }}",
  ],
)
def test_a_template_that_tries_what_is_forbidden_is_stopped(source):
  with pytest.raises(ValueError, match=r"the chat template does something that is forbidden .*do not trust"):
    render(source)


def test_a_template_cannot_change_the_messages():
  messages = [{"role": "user", "content": "hi"}]
  with pytest.raises(ValueError, match="forbidden"):
    render("{% set _ = messages[0].update({'content': 'x'}) %}", messages)
  assert messages == USER


def test_a_template_that_does_not_parse_names_its_line():
  with pytest.raises(ValueError, match=r"chat_template\.jinja: line 2 of the chat template does not parse"):
    ChatTemplate("fine\n{% if %}", {}, name="chat_template.jinja", date=TODAY)


@pytest.mark.parametrize(
  "source", ["{% if 1 %}" * 5000 + "{% endif %}" * 5000, "{{ " + "(" * 5000 + ")" * 5000 + " }}"]
)
def test_a_template_that_is_nested_too_deep_is_named(source):
  with pytest.raises(
    ValueError, match=r"chat_template\.jinja: the chat template cannot be read \(it is nested too deep\)"
  ):
    ChatTemplate(source, {}, name="chat_template.jinja", date=TODAY)


def test_the_template_is_found_where_transformers_finds_it():
  named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
  assert find_template(config_with("S")) == ("S", "tokenizer_config.json")
  assert find_template(config_with(named)) == ("D", "tokenizer_config.json")
  assert find_template(config_with({"default": "D", "rag": "R"})) == ("D", "tokenizer_config.json")
  own = {"chat_template.jinja": "é".encode()}
  assert find_template(config_with("S") | own) == ("é", "chat_template.jinja")
  assert find_template(config_with(None)) is None
  assert find_template({}) is None


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ([{"name": "tools", "template": "T"}], r"none of the chat templates \['tools'\] is named 'default'"),
    (["T"], "chat_template is a list without `name` and `template`"),
    (7, "chat_template is a int, expected text"),
  ],
)
def test_a_template_of_another_form_is_named(template, message):
  with pytest.raises(ValueError, match=message):
    find_template(config_with(template))


def test_a_template_that_is_not_text_is_named():
  with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 \(byte 1"):
    find_template({"chat_template.jinja": b"a\xff"})
