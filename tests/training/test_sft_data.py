"""The user's own data as token ids: files, folders and the hub; pieces of texts; what is too long."""

import json
import shutil

import pytest

from d1jax.data import tokenizer as tokenizers
from d1jax.tasks import DataError, tables
from d1jax.training.sft_data import Options, of_file
from tests.data.folders import CHATML, shared_tokenizers, small_files

CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]}
PAIRS = [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}."} for i in range(9)]
GSM8K = {"question": "Q?", "answer": "He has 6.\n#### 6"}
PACKED = Options(2, (32,), (32,), packed=True)


@pytest.fixture(scope="module")
def tokenizer():
  """Reads bytes, and has a chat template."""
  return tokenizers.from_files(small_files())


def write(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def read(tokenizer, path, options=PACKED, held_out=0.0, block=None, root=None):
  return of_file(root, str(path), tokenizer, held_out, options, block)


def test_a_chat_is_what_the_template_writes(tmp_path, tokenizer):
  found, validation = read(tokenizer, write(tmp_path / "mine.jsonl", CHAT))
  assert validation is None
  (prompt,), (answer,) = found
  assert tokenizer.decode_raw([prompt]) == ["<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"]
  assert tokenizer.decode_raw([answer]) == ["So it is.<|im_end|><|end|>"]


@pytest.mark.parametrize("block", [None, 4])
def test_a_text_is_cut_into_pieces_of_a_row_and_nothing_is_lost(tmp_path, tokenizer, block):
  text = "".join(chr(97 + i % 26) for i in range(100))
  found, _ = read(tokenizer, write(tmp_path / "mine.jsonl", {"text": text}), block=block)
  end = tokenizer.stop_ids[0]
  assert [len(prompt) + len(answer) for prompt, answer in zip(*found, strict=True)] == [64, 39]
  assert found.prompts[0] == [end], "there is no start token"
  assert [i for piece in found.completions for i in piece] == [*tokenizer.encode(text), end]
  assert found.prompts[1] == found.completions[0][-1:]
  whole, _ = read(tokenizer, tmp_path / "mine.jsonl", Options(2, (8,), (128,)), block=block)
  assert [len(answer) for answer in whole.completions] == [101]


def test_ends_follow_an_answer_and_a_hash_says_how_many(tmp_path, tokenizer):
  path = write(tmp_path / "mine.jsonl", *PAIRS)
  (plain, _), (ended, _), (again, _) = (
    read(tokenizer, path, Options(2, (64,), (64,), packed=True, ends=ends)) for ends in (0, 16, 16)
  )
  assert ended == again
  extra = [len(long) - len(short) for long, short in zip(ended.completions, plain.completions, strict=True)]
  assert len(set(extra)) > 3
  assert 0 <= min(extra) <= max(extra) <= 16
  for long, short in zip(ended.completions, plain.completions, strict=True):
    assert long == [*short, *[tokenizer.pad_id] * (len(long) - len(short))]
  for options, block in ((Options(2, (8,), (8,), ends=4), None), (Options(2, (8,), (8,), packed=True, ends=4), 4)):
    with pytest.raises(ValueError, match=r"sft.ends=4 is for packed rows of full attention.*use sft.ends=0"):
      options.check(block)


def test_turns_of_a_conversation_are_held_out_together_and_by_number(tmp_path, tokenizer):
  turns = CHAT["messages"] + [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
  rows = [{"messages": [{"role": "user", "content": f"Question {i}"}, *turns[1:]]} for i in range(6)]
  options = Options(2, (128,), (64,), packed=True)
  found, validation = read(tokenizer, write(tmp_path / "mine.jsonl", *rows), options, held_out=2)
  assert (len(found.prompts), len(validation.prompts)) == (8, 4)
  assert read(tokenizer, tmp_path / "mine.jsonl", options, held_out=2.0) == (found, validation)
  with pytest.raises(ValueError, match="held_out=6 parts 12 demonstrations into 0 to train on and 12 to hold out"):
    read(tokenizer, tmp_path / "mine.jsonl", options, held_out=6)


def test_a_folder_is_read_file_by_file_each_of_its_kind(tmp_path, tokenizer, capsys):
  write(tmp_path / "data" / "b.jsonl", *PAIRS[:2])
  write(tmp_path / "data" / "inside" / "a.jsonl", CHAT)
  write(tmp_path / "data" / "c.jsonl", GSM8K)
  (tmp_path / "data" / "README.md").write_text("about them")
  found, _ = read(tokenizer, "data", Options(2, (256,), (256,), packed=True), root=str(tmp_path))
  texts = tokenizer.decode_all(found.completions)
  assert texts[:2] == ["It is 0.", "It is 2."]
  assert texts[2:] == ["<reasoning>He has 6.</reasoning>\n<answer>6</answer>", "So it is."]
  assert "tokens in packed rows of" in capsys.readouterr().out


def test_parquet_and_the_hub_give_the_same(tmp_path, tokenizer, monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  expected, _ = read(tokenizer, write(tmp_path / "mine.jsonl", *PAIRS))
  datasets.Dataset.from_list(PAIRS).to_parquet(tmp_path / "mine.parquet")
  assert read(tokenizer, tmp_path / "mine.parquet")[0] == expected
  asked = []
  load = lambda *arguments, **options: asked.append((arguments, options)) or datasets.Dataset.from_list(PAIRS)
  monkeypatch.setattr(datasets, "load_dataset", load)
  assert read(tokenizer, "some/pairs", root=tables.HUB)[0] == expected
  assert read(tokenizer, "some/pairs:main", root=tables.HUB)[0] == expected
  assert asked == [(("some/pairs", name), {"split": "train"}) for name in (None, "main")]
  monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: datasets.Dataset.from_list([{"prompt": "x"}]))
  with pytest.raises(ValueError, match=r"^some/pairs train row 1: fields 'prompt' fit no known schema; rename them"):
    read(tokenizer, "some/pairs", root=tables.HUB)


def test_long_examples_are_left_out_and_the_first_is_named(tmp_path, tokenizer, capsys):
  long = [{"prompt": "Why?", "response": "So. " * n} for n in (2, 80, 90)]
  path = write(tmp_path / "mine.jsonl", *PAIRS, *long)
  found, _ = read(tokenizer, path, Options(2, (64,), (64,), packed=True))
  assert len(found.prompts) == 12
  said = f"{path}: left out 2 of 12 demonstrations longer than a row of 128 tokens (the first: {path} line 11)"
  assert said in capsys.readouterr().out
  read(tokenizer, path, Options(2, (64,), (64,)))
  assert (
    f"{path}: left out 2 of 12 answers longer than 64 tokens (the first: {path} line 11)" in capsys.readouterr().out
  )
  with pytest.raises(
    ValueError, match=r"none of 12 .* fits a row of 8 tokens, .*; the shortest \(.*mine.jsonl line 10\) has 33"
  ):
    read(tokenizer, path, Options(2, (4,), (4,), packed=True))


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, r"data is a folder without a file of data; put files into it that end in .jsonl, "),
    ({"a.jsonl": []}, r"data/a.jsonl: the file is empty"),
    ({"a.jsonl": [PAIRS[0], CHAT]}, r"data/a.jsonl line 2: has messages, but .*a.jsonl line 1 has prompt and response"),
    (
      {"a.jsonl": [{"instruction": "x"}]},
      r"line 1: fields 'instruction' fit no .*rename .*\(messages; prompt, response; ",
    ),
    ({"a.jsonl": [3]}, r"a.jsonl line 1: is a JSON int, expected an object; write one object a line"),
    ({"a.jsonl": [CHAT, {"messages": [{"role": "judge", "content": "x"}, CHAT["messages"][1]]}]}, r"line 2: .*judge"),
  ],
)
def test_wrong_data_is_one_line_with_file_and_line(tmp_path, files, message):
  tokenizer = tokenizers.from_files(
    small_files("{% if messages[0].role == 'judge' %}{{ raise_exception('judge') }}{% endif %}" + CHATML)
  )
  (tmp_path / "data").mkdir()
  for name, rows in files.items():
    write(tmp_path / "data" / name, *rows)
  with pytest.raises(ValueError, match=message) as caught:
    read(tokenizer, tmp_path / "data")
  assert "\n" not in str(caught.value)


def test_parquet_that_is_none_is_one_line(tmp_path, tokenizer, monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  (tmp_path / "mine.parquet").write_bytes(b"no parquet")
  with pytest.raises(DataError, match=r"mine.parquet: cannot be read \(.*\); fetch it again") as caught:
    read(tokenizer, tmp_path / "mine.parquet")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2", "dream7b"])
def test_real_tokenizers_get_a_mask_and_write_turns(tmp_path, name):
  """SmolLM2's files name no mask: it is the first id behind the tokenizer's own. Dream's name theirs."""
  folder = shutil.copytree(shared_tokenizers() / name, tmp_path / name, copy_function=shutil.copyfile)
  folder.chmod(0o755)
  if name == "smollm2":
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  found = tokenizers.load(folder)
  assert (found.mask_id == 49152) == (name == "smollm2")
  rows, _ = read(
    found, write(tmp_path / "mine.jsonl", CHAT, {"messages": CHAT["messages"][:1] * 2 + CHAT["messages"][1:]})
  )
  assert [text.count("Why?") for text in found.decode_all(rows.prompts)] == [1, 2]
  assert found.decode_all(rows.completions) == ["So it is."] * 2
  assert all(answer[-1] in found.stop_ids for answer in rows.completions)
