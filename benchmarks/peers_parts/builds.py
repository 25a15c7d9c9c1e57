"""Builders of the engines, called in each engine's process, which imports only what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers_parts.contract import Peer

if TYPE_CHECKING:  # another environment may lack our engine's dependencies
    from dspark_core.engine.building import EngineOptions


def build_native(options: EngineOptions, requests: int) -> Peer:
    from benchmarks.peers_parts.native_peer import NativePeer

    return NativePeer(options, max_requests=requests)


def build_transformers(model: str, prompt_lookup: bool) -> Peer:
    import torch

    from benchmarks.peers_parts.transformers_peer import TransformersPeer

    return TransformersPeer(model, torch.bfloat16, prompt_lookup=prompt_lookup)


def build_llama_cpp(path: Path, threads: int, requests: int) -> Peer:
    from benchmarks.peers_parts.llama_cpp_peer import LlamaCppPeer

    return LlamaCppPeer(path, threads=threads, max_requests=requests, context_tokens=1024)


def build_vllm(directory: Path, threads: int, requests: int) -> Peer:
    from benchmarks.peers_parts.vllm_peer import VllmPeer

    return VllmPeer(directory, threads=threads, max_requests=requests, context_tokens=1024)
