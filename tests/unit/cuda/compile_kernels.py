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

HEAD_DIM, GROUP, TILE = 128, 4, 8
POINTERS = {"tiles": "*i64", "runs": "*i64", "pages": "*i64", "slots": "*i64", "sums": "*fp32"}
CACHED = ("q", "k", "v", "keys", "values", "out")


def compiled(function, capability: int, constants: dict, partial: str) -> int:
    """-> bytes of shared memory"""
    names = inspect.signature(function.fn).parameters
    kinds = {name: POINTERS.get(name, "*bf16" if name in CACHED else "i32") for name in names}
    kinds |= {"partial": partial, "scale": "fp32"}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made.metadata.shared


def main(capability: int) -> None:
    heads = {"HEAD_DIM": HEAD_DIM, "BLOCK_D": HEAD_DIM}
    tile = {"GROUP": GROUP, "PAGE": 16, "TILE": TILE, "BLOCK_M": TILE * GROUP, "BLOCK_N": 32}
    attend = heads | tile | {"WINDOW": 0, "TWO_WAY": False, "SPLIT": True}
    combine = heads | {"MOST": kernels.MAX_SPLITS}
    store = heads | {"HEADS": 8, "BLOCK_H": 8}
    shared = {
        "attend": compiled(kernels._attend, capability, attend, "*fp32"),
        "combine": compiled(kernels._combine, capability, combine, "*fp32"),
        "store": compiled(kernels._store, capability, store, "*bf16"),
    }
    print(json.dumps(shared))


if __name__ == "__main__":
    main(int(sys.argv[1]))
