"""Constants of SplitMix64, which hashes n-gram contexts and makes coupled noise.

`kernels/csrc/splitmix.h` has the same ones. Tables on disk and the output of seeded requests depend on them.
"""

from __future__ import annotations

WEYL = 0x9E37_79B9_7F4A_7C15
MIX_1 = 0xBF58_476D_1CE4_E5B9
MIX_2 = 0x94D0_49BB_1331_11EB
