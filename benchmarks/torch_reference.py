"""d1's loops in plain PyTorch, for comparison: LLaDA's sampling loop and the diffu-GRPO update.

Written from descriptions of d1 (arXiv 2504.12216) and LLaDA (arXiv 2502.09992), with what they compute, no more and
no less: logits of the whole canvas at every step, noise and softmax over all of them, a top-k a row, whole logits
[B, L, V] in the update. What d1 does against its own speed beside that (quantised weights, unmerged adapters, emptying
the allocator's cache at every step) is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

from benchmarks import timing
from d1jax.models.transformer import TransformerSize


def sees(platform: str) -> bool:
  """Whether PyTorch can compute where JAX does."""
  return platform == "cpu" or torch.cuda.is_available()


def peak_bytes(function: Callable[[], Any]) -> int | None:
  """Bytes allocated at most during a call, beyond those before; on a CPU by how much the process grew."""
  if not torch.cuda.is_available():
    return timing.peak_growth(function)
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  function()
  return int(torch.cuda.max_memory_allocated() - before)


class Transformer:
  """LLaDA's network with the weights of ours.

  Attributes:
    weights: all parameters.
    decayed: those that weight decay acts on: all but the norms' scales.
  """

  def __init__(self, params: Any, size: TransformerSize, dtype: str, *, trained: bool = False):
    """Copies the weights, matrices as PyTorch keeps them, [out, in], to the GPU if there is one.

    Args:
      params: of `d1jax.models.transformer`; their dtype is kept.
      size: of the network.
      dtype: of products.
      trained: whether gradients are wanted.
    """
    torch.set_num_threads(timing.cores())
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.dtype: torch.dtype = getattr(torch, dtype)
    self.weights: list[torch.Tensor] = []
    self.decayed: list[torch.Tensor] = []

    def own(x: Any, *, matrix: bool = True) -> torch.Tensor:
      stored = getattr(torch, str(x.dtype))
      x = np.array(x, np.float32)
      tensor = torch.from_numpy(np.ascontiguousarray(x.T) if matrix else x)
      tensor = tensor.to(self.device, stored).requires_grad_(trained)
      self.weights.append(tensor)
      if tensor.ndim > 1:
        self.decayed.append(tensor)
      return tensor

    blocks = jax.device_get(params["blocks"])
    attention, mlp = blocks["attention"], blocks["mlp"]
    self.size = size
    self.embedding = own(params["embedding"], matrix=False)
    self.layers = [
      {
        **{name: own(attention[name][i]) for name in ("query", "key", "value", "out")},
        **{name: own(mlp[name][i]) for name in ("gate", "up", "down")},
        **{name: own(blocks[name]["scale"][i], matrix=False) for name in ("attention_norm", "mlp_norm")},
      }
      for i in range(size.layers)
    ]
    self.final_norm = own(params["final_norm"]["scale"], matrix=False)
    self.head = own(params["head"])

  def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] of tokens [B, L], in the dtype of the products."""
    x = self.embedding[tokens].to(self.dtype)
    angles = self._angles(tokens.shape[1])
    for layer in self.layers:
      y = self._norm(x, layer["attention_norm"])
      q, k, v = (self._heads(_linear(y, layer[name])) for name in ("query", "key", "value"))
      mixed = functional.scaled_dot_product_attention(_rotated(q, *angles), _rotated(k, *angles), v)
      x = x + _linear(mixed.transpose(1, 2).flatten(2), layer["out"])
      y = self._norm(x, layer["mlp_norm"])
      hidden = functional.silu(_linear(y, layer["gate"])) * _linear(y, layer["up"])
      x = x + _linear(hidden, layer["down"])
    return _linear(self._norm(x, self.final_norm), self.head)

  @torch.no_grad()
  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, L, V] on the host."""
    return self(torch.from_numpy(tokens).to(self.device)).float().cpu().numpy()

  def _heads(self, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, self.size.head_size)).transpose(1, 2)

  def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.size.norm_eps)).to(x.dtype) * scale.to(x.dtype)

  def _angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = self.size.head_size // 2
    frequency = self.size.rope_theta ** (-torch.arange(half, device=self.device) / half)
    angle = torch.arange(length, device=self.device)[:, None] * frequency
    return angle.cos(), angle.sin()


def _linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
  return functional.linear(x, w.to(x.dtype))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  first, second = x.float().chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@torch.no_grad()
def generate(
  model: Transformer, prompt: np.ndarray, *, completion: int, block: int, steps: int, temperature: float, mask_id: int
) -> np.ndarray:
  """Completes prompts [B, P] by d1's loop; tokens [B, C]."""
  batch, length = prompt.shape
  x = torch.full((batch, length + completion), mask_id, device=model.device)
  x[:, :length] = torch.from_numpy(prompt)
  per_block = steps // (completion // block)
  for start in range(length, length + completion, block):
    end = start + block
    masks = (x[:, start:end] == mask_id).sum(1)
    base, rest = masks // per_block, masks % per_block
    for step in range(per_block):
      masked = x == mask_id
      logits = model(x)
      proposal = _noisy(logits, temperature).argmax(-1)
      confidence = functional.softmax(logits, -1).gather(-1, proposal[..., None])[..., 0]
      confidence[:, end:] = -math.inf
      confidence = torch.where(masked, confidence, -math.inf)
      proposal = torch.where(masked, proposal, x)
      chosen = torch.zeros_like(masked)
      for row in range(batch):
        count = int(base[row] + (step < rest[row]))
        chosen[row, confidence[row].topk(count).indices] = True
      x[chosen] = proposal[chosen]
  return x[:, length:].cpu().numpy()


def _noisy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
  """LLaDA's form of Gumbel noise, exp(l) / (-log u)^T, whose argmax is a draw from softmax(l / T)."""
  if temperature == 0:
    return logits
  return logits.exp() / (-torch.rand_like(logits).log()) ** temperature


def _logps(model: Transformer, canvas: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
  """One-step log-probabilities [B, C] of completions under masked canvases [B, L]."""
  logits = model(canvas)[:, -completion.shape[1] :]
  losses = functional.cross_entropy(logits.flatten(0, 1), completion.flatten(), reduction="none")
  return -losses.view(completion.shape).float()


class Update:
  """diffu-GRPO's update: mu AdamW steps on one batch of completions, with d1's settings of the optimiser."""

  def __init__(self, model: Transformer, *, rates: Sequence[float], max_grad_norm: float, **adamw: Any):
    """The state of the optimiser.

    Args:
      model: is trained.
      rates: the learning rate of each step of an update.
      max_grad_norm: of the clip by global norm.
      **adamw: of `torch.optim.AdamW`, for the weights that decay.
    """
    self.model, self.rates, self.max_grad_norm = model, rates, max_grad_norm
    decayed = {id(w) for w in model.decayed}
    norms = [w for w in model.weights if id(w) not in decayed]
    groups = [{"params": model.decayed}, {"params": norms, "weight_decay": 0.0}]
    self.optimizer = torch.optim.AdamW(groups, lr=0.0, **adamw)

  def __call__(
    self,
    reference: Transformer,
    canvases: np.ndarray,
    completion: np.ndarray,
    advantages: np.ndarray,
    *,
    parts: int,
    epsilon: float,
    beta: float,
  ) -> list[float]:
    """One update.

    Args:
      reference: the policy of the KL term.
      canvases: [mu, B, L], the masked prompts and masks of each step.
      completion: ids [B, C]; all of them count.
      advantages: [B].
      parts: micro-batches a step.
      epsilon: half width of the clip.
      beta: weight of the KL term.

    Returns:
      The loss of each step.
    """
    device, steps = self.model.device, canvases.shape[0]
    tokens = torch.tensor(completion, device=device).long()
    inputs = torch.tensor(canvases, device=device)
    advantage = torch.tensor(advantages, device=device)[:, None]
    rows = [slice(part, None, parts) for part in range(parts)]
    with torch.no_grad():  # all masks of a micro-batch in one forward pass
      old, ref = (
        [
          _logps(m, inputs[:, r].flatten(0, 1), tokens[r].repeat(steps, 1)).view(steps, -1, tokens.shape[1])
          for r in rows
        ]
        for m in (self.model, reference)
      )
    losses = []
    for step in range(steps):
      self.optimizer.zero_grad(set_to_none=True)
      total = 0.0
      for part, r in enumerate(rows):
        logp = _logps(self.model, inputs[step, r], tokens[r])
        ratio = (logp - old[part][step]).exp()
        surrogate = torch.minimum(ratio * advantage[r], ratio.clamp(1 - epsilon, 1 + epsilon) * advantage[r])
        difference = ref[part][step] - logp
        loss = (-surrogate + beta * (difference.exp() - difference - 1)).sum() / tokens.numel()
        loss.backward()
        total += loss.item()
      torch.nn.utils.clip_grad_norm_(self.model.weights, self.max_grad_norm)
      for group in self.optimizer.param_groups:
        group["lr"] = self.rates[step]
      self.optimizer.step()
      losses.append(total)
    return losses
