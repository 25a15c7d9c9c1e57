"""vLLM as what computes the target: its model, kernels and cache, our rounds (docs/vllm.md)."""
