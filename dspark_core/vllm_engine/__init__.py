"""vLLM as the target engine: its model, kernels and cache under this project's rounds (docs/vllm.md)."""
