"""Compiles the kernels for a GPU that need not be there -> shared memory of each as JSON on stdout.

A process of its own: where the interpreter was asked for, kernels are no longer compiled.
"""

import inspect
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dspark_core.cuda import paged_attention as kernels
from dspark_core.cuda.tiles import COMBINED_AT_A_TIME, MAX_SPLITS, Tile, tile_of, tile_queries

GROUP = 4
ALIGNED = ("q_token", "q_head", "kv_slot", "kv_head_stride", "partial", "sums")
"""What a launch finds to be multiples of 16, besides `CACHED`: then loads are asynchronous, and buffered."""
POINTERS = {"tiles": "*i64", "runs": "*i64", "pages": "*i64", "slots": "*i64", "sums": "*fp32"}
CACHED = ("q", "k", "v", "keys", "values", "out")
BYTES = {"bf16": 2, "fp32": 4}


def compiled(function, capability: int, constants: dict, number: str, tile: Tile | None = None) -> int:
    """-> bytes of shared memory"""
    names = inspect.signature(function.fn).parameters
    kinds = {name: POINTERS.get(name, f"*{number}" if name in CACHED else "i32") for name in names}
    kinds |= {"partial": "*fp32", "scale": "fp32"}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, name in enumerate(names) if name in (*CACHED, *ALIGNED)}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    warps, stages = (4, 2) if tile is None else (tile.warps, tile.stages)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made.metadata.shared


def attention(capability: int, head_dim: int, number: str, shared_bytes: int) -> int:
    """With the largest tile that such a GPU gets."""
    value_bytes = BYTES[number]
    queries = tile_queries(
        64, group=GROUP, head_dim=head_dim, value_bytes=value_bytes, shared_bytes=shared_bytes
    )
    tile = tile_of(queries * GROUP, head_dim, value_bytes, shared_bytes)
    sizes = {"GROUP": GROUP, "HEAD_DIM": head_dim, "BLOCK_D": tile.head_size, "PAGE": 16, "TILE": queries}
    how = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "WINDOW": 0, "TWO_WAY": False, "SPLIT": True}
    return compiled(kernels._attend, capability, sizes | how, number, tile)


def main(capability: int, shared_bytes: int) -> None:
    shared = {
        f"attend {head_dim} {number}": attention(capability, head_dim, number, shared_bytes)
        for head_dim, number in ((128, "bf16"), (256, "bf16"), (512, "bf16"), (512, "fp32"))
    }
    heads = {"HEAD_DIM": 128, "BLOCK_D": 128}
    parts = {"MOST": MAX_SPLITS, "PARTS": COMBINED_AT_A_TIME}
    shared["combine"] = compiled(kernels._combine, capability, heads | parts, "bf16")
    shared["store"] = compiled(kernels._store, capability, heads | {"HEADS": 8, "BLOCK_H": 8}, "bf16")
    print(json.dumps(shared))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
