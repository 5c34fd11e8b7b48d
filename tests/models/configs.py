"""The config.json of small folders: the keys of the real models, as the hub has them."""

from typing import Any

Config = dict[str, Any]

BLOCKS = {"sdar": 4, "fast_dllm_qwen": 4}
"""Block lengths of the block-causal families, which only `fast_dllm_qwen` has in its config.json."""


def llada_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of GSAI-ML/LLaDA-8B-Instruct."""
  return {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
      "AutoConfig": "configuration_llada.LLaDAConfig",
      "AutoModel": "modeling_llada.LLaDAModelLM",
      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": s["embed"],
    "embedding_dropout": 0.0,
    "embedding_size": s["vocab"],
    "eos_token_id": s["vocab"] - 8,
    "flash_attention": True,
    "flash_attn_varlen": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": s["vocab"] - 4,
    "max_sequence_length": 4096,
    "mlp_hidden_size": s["mlp"],
    "mlp_ratio": 4,  # of no effect beside mlp_hidden_size
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": s["heads"],
    "n_kv_heads": s["kv_heads"],
    "n_layers": s["layers"],
    "pad_token_id": s["vocab"] - 8,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": dtype,
    "transformers_version": "4.51.2",
    "use_cache": False,
    "vocab_size": s["vocab"],
    "weight_tying": False,
  }


def hub_config(s: dict[str, int], dtype: str) -> Config:
  """The keys that Llama, Qwen2 and Dream share, as transformers 4 writes them."""
  return {
    "attention_dropout": 0.0,
    "bos_token_id": s["vocab"] - 9,
    "eos_token_id": s["vocab"] - 9,
    "hidden_act": "silu",
    "hidden_size": s["embed"],
    "initializer_range": 0.02,
    "intermediate_size": s["mlp"],
    "max_position_embeddings": 131072,
    "num_attention_heads": s["heads"],
    "num_hidden_layers": s["layers"],
    "num_key_value_heads": s["kv_heads"],
    "rms_norm_eps": 1e-06,
    "torch_dtype": dtype,
    "use_cache": True,
    "vocab_size": s["vocab"],
  }


def dream_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Dream-org/Dream-v0-Instruct-7B."""
  return hub_config(s, dtype) | {
    "_name_or_path": "Dream-org/Dream-v0-Instruct-7B",
    "architectures": ["DreamModel"],
    "attn_implementation": "flash_attention_2",
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "mask_token_id": s["vocab"] - 4,
    "max_window_layers": s["layers"],
    "model_type": "Dream",
    "pad_token_id": s["vocab"] - 9,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.2",
    "use_mrope": False,
    "use_sliding_window": False,
  }


def qwen2_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Qwen/Qwen2.5-0.5B: the sliding window is stated and not used."""
  return hub_config(s, dtype) | {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
    "max_window_layers": s["layers"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "sliding_window": 4,
    "tie_word_embeddings": True,
    "transformers_version": "4.43.1",
    "use_mrope": False,
    "use_sliding_window": False,
  }


def qwen3_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Qwen/Qwen3-8B."""
  return hub_config(s, dtype) | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": s["head_size"],
    "max_position_embeddings": 40960,
    "max_window_layers": s["layers"],
    "model_type": "qwen3",
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
  }


def a2d_qwen3_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1: those of Qwen3-0.6B as transformers 4.57 writes them."""
  config = qwen3_config(s, dtype) | {
    "architectures": ["A2DQwen3LMHeadModel"],
    "dtype": dtype,
    "layer_types": ["full_attention"] * s["layers"],
    "model_type": "a2d-qwen3",
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0",
  }
  del config["torch_dtype"]
  return config


def sdar_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of JetLM/SDAR-4B-Chat; neither the block length nor the mask is among them."""
  return qwen3_config(s, dtype) | {
    "architectures": ["SDARForCausalLM"],
    "attn_implementation": "flash_attention_2",
    "auto_map": {
      "AutoConfig": "configuration_sdar.SDARConfig",
      "AutoModel": "modeling_sdar.SDARModel",
      "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "max_position_embeddings": 32768,
    "micro_forward": False,
    "model_type": "sdar",
    "pad_token_id": s["vocab"] - 9,
    "skip_checkpoint": False,
    "transformers_version": "4.52.3",
    "use_deepep": False,
  }


def fast_dllm_qwen_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of Efficient-Large-Model/Fast_dLLM_v2_7B; the head is tied, as in the 1.5B."""
  config = qwen2_config(s, dtype) | {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
      "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
      "AutoModel": "modeling.Fast_dLLM_QwenModel",
      "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": BLOCKS["fast_dllm_qwen"],
    "conplemenrary_mask": True,
    "layer_types": ["full_attention"] * s["layers"],
    "model_type": "Fast_dLLM_Qwen",
    "pad_token_id": s["vocab"] - 7,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.53.1",
  }
  del config["use_mrope"]
  return config


def illada_config(s: dict[str, int], dtype: str) -> Config:
  """The keys that the code of GSAI-ML/iLLaDA-8B-Base reads; its config.json was not seen."""
  return hub_config(s, dtype) | {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "dtype": dtype,
    "layer_norm_eps": None,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "illada",
    "pad_token_id": s["vocab"] - 8,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.1",
  }


def llama_config(s: dict[str, int], dtype: str) -> Config:
  """The keys of meta-llama/Llama-3.1-8B-Instruct; the rotary scaling is strong enough to matter in ten positions.

  With theta 100 and 8 frequencies the wavelengths are 6.3, 11, 20, 35, 63, ...: one is kept, three are in the smooth
  part and the others are divided by the factor.
  """
  return hub_config(s, dtype) | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [s["vocab"] - 9, s["vocab"] - 8, s["vocab"] - 7],
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 40,
      "rope_type": "llama3",
    },
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.3",
  }


def llama_tied_config(s: dict[str, int], dtype: str) -> Config:
  """A tied Llama as transformers 5 writes it: `dtype`, `rope_parameters`, an explicit `head_dim`."""
  config = hub_config(s, dtype) | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "dtype": dtype,
    "head_dim": s["head_size"],
    "mlp_bias": False,
    "model_type": "llama",
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
      "factor": 32.0,
      "high_freq_factor": 4.0,
      "low_freq_factor": 1.0,
      "original_max_position_embeddings": 40,
      "rope_theta": 200.0,
      "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
  }
  del config["torch_dtype"]
  return config


CONFIGS = {
  "llada": llada_config,
  "llada_llama_names": llada_config,
  "dream": dream_config,
  "qwen2": qwen2_config,
  "qwen3": qwen3_config,
  "a2d_qwen3": a2d_qwen3_config,
  "sdar": sdar_config,
  "fast_dllm_qwen": fast_dllm_qwen_config,
  "illada": illada_config,
  "llama": llama_config,
  "llama_tied": llama_tied_config,
}
