"""From text to batches: tokenizers and deterministic, resumable pipelines."""
