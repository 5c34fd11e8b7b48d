"""Makes tests/models/goldens with PyTorch: `python -m tests.models.make_goldens` from the root of the repository.

Needs torch, transformers, peft and ml_dtypes, which nothing else of the project does. Every golden is the output of
somebody else's code on a folder of `tests.models.folders`; this script only renames tensors, where a family is not one
that transformers knows, and checks what it stores: that every tensor was loaded, that attention goes both ways, that
padding does not matter, that no block sees a later one, and that a second implementation agrees.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
  AutoConfig,
  AutoModelForCausalLM,
  LlamaConfig,
  LlamaForCausalLM,
  Qwen2Config,
  Qwen2ForCausalLM,
  Qwen3Config,
  Qwen3ForCausalLM,
)

from tests.models import folders
from tests.models.configs import BLOCKS

GOLDENS = Path(__file__).parent / "goldens"
LENGTHS = (14, 9, 4)
NATIVE = ("qwen2", "qwen3", "llama", "llama_tied")
"""Families whose folder transformers reads as it is."""
KINDS = {
  "dream": (Qwen2Config, Qwen2ForCausalLM),
  "qwen2": (Qwen2Config, Qwen2ForCausalLM),
  "fast_dllm_qwen": (Qwen2Config, Qwen2ForCausalLM),
  "qwen3": (Qwen3Config, Qwen3ForCausalLM),
  "a2d_qwen3": (Qwen3Config, Qwen3ForCausalLM),
  "sdar": (Qwen3Config, Qwen3ForCausalLM),
}
"""What transformers has of a family's network; the others are Llamas."""

LLADA_NAMES = {
  r"^model\.transformer\.wte\.": "model.embed_tokens.",
  r"^model\.transformer\.ln_f\.": "model.norm.",
  r"^model\.transformer\.ff_out\.": "lm_head.",
  r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
  r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
  r"^model\.transformer\.blocks\.(\d+)\.([qkv])_proj\.": r"model.layers.\1.self_attn.\2_proj.",
  r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
  r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
  r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
  r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
HUB_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, Any]] = {
  "llama_all": ("llama", HUB_TARGETS),
  "llama_qv": ("llama", ["q_proj", "v_proj"]),
  "qwen3_all": ("qwen3", HUB_TARGETS),
  # What d1 asks for: on LLaDA's names, peft finds four of the seven and says nothing of the others.
  "llada_d1": ("llada", HUB_TARGETS),
  "llada_all": ("llada", r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"),
}

Tensors = dict[str, torch.Tensor]


def batch_of(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Left-padded rows; the padding holds random tokens, so that a leak shows."""
  tokens = np.random.RandomState(vocab).randint(0, vocab, (len(LENGTHS), max(LENGTHS)))
  valid = np.arange(max(LENGTHS))[None] >= max(LENGTHS) - np.asarray(LENGTHS)[:, None]
  return torch.from_numpy(tokens), torch.from_numpy(valid)


def read(folder: Path) -> dict[str, Any]:
  """The configuration of a folder."""
  return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def transformers_config(family: str, folder: Path) -> LlamaConfig | Qwen2Config | Qwen3Config:
  """The configuration as transformers takes it."""
  if family in NATIVE:
    return AutoConfig.from_pretrained(folder)
  config = read(folder)
  if not family.startswith("llada"):
    kind = KINDS.get(family, (LlamaConfig,))[0]
    return kind(**{key: value for key, value in config.items() if key not in ("model_type", "auto_map")})
  return LlamaConfig(
    vocab_size=config["embedding_size"],
    hidden_size=config["d_model"],
    intermediate_size=config["mlp_hidden_size"],
    num_hidden_layers=config["n_layers"],
    num_attention_heads=config["n_heads"],
    num_key_value_heads=config["n_kv_heads"],
    rms_norm_eps=config["rms_norm_eps"],
    rope_theta=config["rope_theta"],
    max_position_embeddings=config["max_sequence_length"],
    tie_word_embeddings=config["weight_tying"],
    attention_bias=config["include_qkv_bias"],
    mlp_bias=config["include_bias"],
  )


def renamed(name: str) -> str:
  """LLaDA's name of a tensor in Llama's words; other names as they are."""
  for pattern, replacement in LLADA_NAMES.items():
    new, found = re.subn(pattern, replacement, name)
    if found:
      return new
  return name


def tensors_of(weights: dict[str, np.ndarray]) -> Tensors:
  """The weights as PyTorch has them."""
  return {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}


def transformers_model(
  family: str, folder: Path, weights: dict[str, np.ndarray], dtype: torch.dtype, attention: str = "eager"
) -> nn.Module:
  """The model of transformers, every tensor of it loaded and every tensor of the folder used."""
  kind = KINDS.get(family, (LlamaConfig, LlamaForCausalLM))[1]
  config = transformers_config(family, folder)
  tensors = {renamed(name): value for name, value in tensors_of(weights).items()}
  assert len(tensors) == len(weights)
  model, report = kind.from_pretrained(
    None,
    config=config,
    state_dict=tensors,
    dtype=dtype,
    attn_implementation=attention,
    output_loading_info=True,
  )
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
  stored = model.state_dict()
  for name, value in tensors.items():
    assert torch.equal(stored[name], value.to(dtype)), name
  left = set(stored) - set(tensors)
  assert left == ({"lm_head.weight"} if config.tie_word_embeddings else set()), left
  if left:
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
  assert model.model.rotary_emb.inv_freq.dtype == torch.float32
  return model.eval()


def visible(valid: torch.Tensor, dtype: torch.dtype, block: int | None) -> torch.Tensor:
  """The additive mask [B 1 L L] under which a query sees every valid key of its own and of earlier blocks.

  Without a block length it sees all valid keys.
  """
  of = torch.arange(valid.shape[1]) // (block or valid.shape[1])
  seen = valid[:, None, None, :] & (of[None, :] <= of[:, None])
  return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def logits_of(model: nn.Module, tokens: torch.Tensor, valid: torch.Tensor, block: int | None = None) -> np.ndarray:
  """Logits at every position, float32, whatever the model computes in."""
  dtype = next(model.parameters()).dtype
  with torch.no_grad():
    out = model(
      input_ids=tokens,
      attention_mask=visible(valid, dtype, block),
      position_ids=torch.arange(tokens.shape[1])[None].expand(tokens.shape),
      use_cache=False,
    )
  return out.logits.float().numpy()


class LladaBlock(nn.Module):
  """A block of LLaDA with LLaDA's names, written from its description."""

  def __init__(self, config: dict[str, Any]):
    super().__init__()
    embed, mlp = config["d_model"], config["mlp_hidden_size"]
    self.heads, self.theta = config["n_heads"], config["rope_theta"]
    self.attn_norm = nn.RMSNorm(embed, eps=config["rms_norm_eps"])
    self.ff_norm = nn.RMSNorm(embed, eps=config["rms_norm_eps"])
    self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(embed, embed, bias=False) for _ in range(4))
    self.ff_proj, self.up_proj = (nn.Linear(embed, mlp, bias=False) for _ in range(2))
    self.ff_out = nn.Linear(mlp, embed, bias=False)

  def turned(self, x: torch.Tensor) -> torch.Tensor:
    """Rotary positions as complex numbers: coordinate i of each half is a real and an imaginary part."""
    real, imaginary = x.double().chunk(2, dim=-1)
    half = real.shape[-1]
    angles = torch.outer(torch.arange(x.shape[-2]), self.theta ** (-torch.arange(half, dtype=torch.float64) / half))
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([product.real, product.imag], dim=-1).to(x.dtype)

  def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The residual stream [B L D], mask [B 1 L L] added to the scores."""
    h = self.attn_norm(x)
    q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
    scores = self.turned(q) @ self.turned(k).transpose(2, 3) / q.shape[-1] ** 0.5 + mask
    x = x + self.attn_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    h = self.ff_norm(x)
    return x + self.ff_out(functional.silu(self.ff_proj(h)) * self.up_proj(h))


class Llada(nn.Module):
  """LLaDA with LLaDA's tree of names, for peft to wrap."""

  def __init__(self, config: dict[str, Any]):
    super().__init__()
    parts = {
      "wte": nn.Embedding(config["embedding_size"], config["d_model"]),
      "blocks": nn.ModuleList(LladaBlock(config) for _ in range(config["n_layers"])),
      "ln_f": nn.RMSNorm(config["d_model"], eps=config["rms_norm_eps"]),
      "ff_out": nn.Linear(config["d_model"], config["embedding_size"], bias=False),
    }
    self.model = nn.Module()
    self.model.transformer = nn.ModuleDict(parts)

  def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
    """As the models of transformers are called."""
    del others
    parts = self.model.transformer
    x = parts.wte(input_ids)
    for block in parts.blocks:
      x = block(x, attention_mask)
    return type("Output", (), {"logits": parts.ff_out(parts.ln_f(x))})


def check(model: nn.Module, tokens: torch.Tensor, valid: torch.Tensor, logits: np.ndarray, block: int | None) -> None:
  """That the last token reaches the first positions of its block, and that padding reaches no valid one."""
  length, keep = tokens.shape[1], valid.numpy()
  size = block or length
  later = tokens.clone()
  later[:, -1] = (later[:, -1] + 1) % logits.shape[-1]
  moved = np.abs(logits_of(model, later, valid, block) - logits).max(-1)
  last = (length - 1) // size * size
  firsts = np.maximum(length - np.asarray(LENGTHS), last)
  assert (moved[np.arange(len(LENGTHS)), firsts] > 1e-3).all(), moved
  assert (moved[:, :last][keep[:, :last]] == 0).all(), "a block sees a later one"
  for end in range(size, length, size):  # a block is the end of a shorter canvas on which attention goes both ways
    start, seen = end - size, keep[:, end - size : end]
    shorter = logits_of(model, tokens[:, :end], valid[:, :end], block)[:, start:]
    assert np.abs(shorter - logits[:, start:end])[seen].max(initial=0) < 1e-5
    if start == 0:
      whole = logits_of(model, tokens[:, :end], valid[:, :end])
      assert np.abs(whole - logits[:, :end])[seen].max(initial=0) < 1e-5
  other = torch.where(valid, tokens, (tokens + 1) % logits.shape[-1])
  assert np.array_equal(logits_of(model, other, valid, block)[keep], logits[keep])
  begin = length - LENGTHS[1]
  cut = begin if block is None else begin // block * block
  alone = logits_of(model, tokens[1:2, cut:], valid[1:2, cut:], block)[0, begin - cut :]
  assert np.abs(alone - logits[1, begin:]).max() < 1e-5, "rotary positions are relative, yet padding shifts them"


def family_golden(family: str, scratch: Path) -> dict[str, float]:
  """Writes the logits of a family, and returns PyTorch's own error in bfloat16."""
  folder = scratch / family
  weights = folders.write(folder, family)
  model = transformers_model(family, folder, weights, torch.float32)
  tokens, valid = batch_of(folders.SIZES[family]["vocab"])
  keep, block = valid.numpy(), BLOCKS.get(family)
  logits = logits_of(model, tokens, valid, block)
  check(model, tokens, valid, logits, block)

  others = [transformers_model(family, folder, weights, torch.float32, "sdpa")]
  if family in NATIVE:
    others.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
  if family == "llada":
    others.append(Llada(read(folder)).eval())
    others[-1].load_state_dict(tensors_of(weights), strict=True)
  agree = [float(np.abs(logits_of(other, tokens, valid, block) - logits)[keep].max()) for other in others]
  assert max(agree) < 1e-5, agree

  half = transformers_model(family, folder, weights, torch.bfloat16)
  error = np.abs(logits_of(half, tokens, valid, block) - logits)[keep]
  np.savez_compressed(
    GOLDENS / f"{family}.npz", tokens=tokens.numpy().astype(np.int32), valid=keep, logits=logits.astype(np.float32)
  )
  spread = float(logits[keep].std())
  print(f"{family}: std {spread:.3f}, others within {max(agree):.1e}, bfloat16 {error.max():.4f} {error.mean():.5f}")
  return {"max_abs": float(error.max()), "mean_abs": float(error.mean()), "logits_std": spread}


def adapter_golden(name: str, scratch: Path) -> dict[str, float]:
  """Writes an adapter's folder and its logits, and returns a probe of every matrix after the merge."""
  family, targets = ADAPTERS[name]
  folder = scratch / name
  weights = folders.write(folder, family)
  if family == "llada":
    base: nn.Module = Llada(read(folder)).eval()
    base.load_state_dict(tensors_of(weights), strict=True)
  else:
    base = transformers_model(family, folder, weights, torch.float32)
  tokens, valid = batch_of(folders.SIZES[family]["vocab"])
  keep = valid.numpy()
  before = logits_of(base, tokens, valid)
  config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0, bias="none")
  model = get_peft_model(base, config).eval()
  assert np.array_equal(logits_of(model, tokens, valid), before), "a fresh adapter is not zero"
  found = set()
  for key, value in model.named_parameters():
    if ".lora_" in key:
      scale = 1.0 if ".lora_A." in key else 0.3
      value.data = scale * torch.from_numpy(folders.draw(f"{name}/{key}", tuple(value.shape)))
      found.add(key.split(".lora_")[0].split(".")[-1])
  logits = logits_of(model, tokens, valid)
  assert np.abs(logits - before)[keep].mean() > 0.1
  save_adapter(model, GOLDENS / name, family)
  np.savez_compressed(
    GOLDENS / f"{name}.npz", tokens=tokens.numpy().astype(np.int32), valid=keep, logits=logits.astype(np.float32)
  )
  merged = model.merge_and_unload()
  agree = float(np.abs(logits_of(merged, tokens, valid) - logits)[keep].max())
  assert agree < 1e-5, agree
  state = {key: value.numpy() for key, value in merged.state_dict().items()}
  assert set(state) == set(weights)
  changed = [key for key in weights if not np.array_equal(weights[key], state[key])]
  print(f"{name}: adapts {sorted(found)}, {len(changed)} matrices, merged within {agree:.1e}")
  return {key: folders.probe(state[key]) for key in sorted(changed)}


def save_adapter(model: Any, folder: Path, family: str) -> None:
  """The folder as peft writes it, with the family in the place of the base's path and without the model card."""
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / "README.md").unlink(missing_ok=True)
  (folder / "adapter_model.safetensors").chmod(0o644)
  path = folder / "adapter_config.json"
  config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": family}
  if isinstance(config["target_modules"], list):  # a set in peft: its order is another one in every run
    config["target_modules"] = sorted(config["target_modules"])
  path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
  """Makes every golden anew."""
  torch.set_num_threads(1)
  torch.set_float32_matmul_precision("highest")
  GOLDENS.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory() as scratch:
    torch_bfloat16 = {family: family_golden(family, Path(scratch)) for family in folders.FAMILIES}
    merged = {name: adapter_golden(name, Path(scratch)) for name in ADAPTERS}
  scalars = {"torch_bfloat16": torch_bfloat16, "merged_probes": merged}
  (GOLDENS / "scalars.json").write_text(json.dumps(scalars, indent=2) + "\n", encoding="utf-8")
  size = sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file())
  print(f"{size / 1000:.0f} kB in {GOLDENS.name}", file=sys.stderr)


if __name__ == "__main__":
  main()
