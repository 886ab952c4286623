"""Kernels for Hopper GPUs (sm_90) in Gluon, which comes with Triton: explicitly scheduled.

They compute what most training and decoding needs, and long rows (:mod:`softpick.ops.triton.dispatch` has the conditions).
Everything else takes the kernels of :mod:`softpick.ops.triton`. No interpreter runs Gluon.
"""

from softpick.ops.triton.hopper.backward import backward_keys, backward_queries
from softpick.ops.triton.hopper.decode import decode_keys
from softpick.ops.triton.hopper.descriptors import row_tiles, tiles
from softpick.ops.triton.hopper.forward import forward_queries
from softpick.ops.triton.hopper.forward_narrow import forward_narrow
from softpick.ops.triton.hopper.rows import rows_backward_ring, rows_forward_ring

__all__ = [
    "backward_keys",
    "backward_queries",
    "decode_keys",
    "forward_narrow",
    "forward_queries",
    "row_tiles",
    "rows_backward_ring",
    "rows_forward_ring",
    "tiles",
]
