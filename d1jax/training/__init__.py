"""The loops: supervised fine-tuning, then diffu-GRPO."""
