"""Writes goldens/tokenizers.json: ids and rendered chats as transformers makes them.

Run it from the root of the repository, with transformers installed and the shared data in place:
`python -m tests.data.make_goldens`. The tests need neither transformers nor this script.
"""

import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from tests.data.folders import shared_tokenizers, write_json, write_llada_tokenizer

GOLDENS = Path(__file__).parent / "goldens" / "tokenizers.json"

TEXTS = [
  "",
  "a",
  " ",
  "Hello, world! It's we'll THEY'RE",
  "  two  spaces  and a tab\t\tthere ",
  "0 12 345 6789 3.14159 1,234,567 -42 1e-5 ½ ٣٤",
  "(44 + 19) * 35 / 7 - 2 = 313\n",
  "line one\nline two\r\nline three\n\n\n  \n indented\n\t\n",
  "def f(x: int) -> int:\n  return x ** 2  # π\n\n\nclass A:\n    pass\n",
  "<reasoning>\nFirst, $\\frac{1}{2} + \\sqrt{3}$.\n</reasoning>\n<answer>\n\\boxed{42}\n</answer>",
  "你好，世界！我们来解这道题：3 + 4 = 7。",
  "こんにちは 안녕하세요 здравствуйте مرحبا שלום",
  "naïve café: e\u0301 and é, Å and A\u030a, ﬁ Ａ ①",
  "🙂👩\u200d👩\u200d👧 🇩🇪 \u00a0\u2003\ufeff\x00\x7f",
  "a <tool_call>\n{}\n</tool_call> b",
  "mask <|mask|> <|mdm_mask|> <| mask |> <mask> [MASK]",
  "<|im_start|>user\n<|im_end|><|endoftext|> </s> <|eot_id|><|start_header_id|>",
]

CHATS = [
  ([{"role": "user", "content": "What is 2 + 2?"}], ""),
  ([{"role": "user", "content": "  \nSolve 3412 by steps.\n\n "}], "<reasoning>\n"),
  (
    [
      {"role": "system", "content": "Be terse."},
      {"role": "user", "content": "\n你好\n"},
      {"role": "assistant", "content": "Hello!"},
      {"role": "user", "content": "Ünd?"},
    ],
    "",
  ),
]

TEMPLATES = [
  "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}\n\n",
  '{{ messages[0] | tojson }}|{{ messages | tojson(indent=2) }}|{{ "<é&" | tojson }}',
  "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ unknown }}",
  "{% for m in messages %}{{ m.role }}:{% generation %}{% set x = 1 %}{{ m.content | trim }}{% endgeneration %}{{ x }}"
  "{% endfor %}",
  "{% if tools is none and not documents %}none{% endif %}{{ 'go' if add_generation_prompt else 'stop' }}",
  "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['k'], 2) | tojson }}{{ messages[0].content.split()[-1] }}",
]


def describe(tokenizer: Any) -> dict[str, Any]:
  """What one tokenizer makes of the texts and chats."""
  chats = []
  for messages, prefill in CHATS:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefill
    ids = tokenizer.encode(text, add_special_tokens=False)
    chats.append({"messages": messages, "prefill": prefill, "text": text, "ids": ids})
  texts = []
  for text in TEXTS:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    texts.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
  return {"texts": texts, "chats": chats}


def main() -> None:
  """Writes the file."""
  found: dict[str, Any] = {"transformers": transformers.__version__}
  found["dream"] = describe(transformers.Qwen2Tokenizer.from_pretrained(str(shared_tokenizers() / "dream7b")))
  with tempfile.TemporaryDirectory() as folder:
    write_llada_tokenizer(Path(folder))
    found["llada"] = describe(transformers.AutoTokenizer.from_pretrained(folder))
  messages = CHATS[2][0]
  found["templates"] = [
    {
      "source": source,
      "messages": messages,
      "text": render_jinja_template([messages], chat_template=source, add_generation_prompt=True)[0][0],
    }
    for source in TEMPLATES
  ]
  write_json(GOLDENS, found)


if __name__ == "__main__":
  main()
