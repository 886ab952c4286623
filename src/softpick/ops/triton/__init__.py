"""GPU kernels in Triton: one family for the whole table of normalizers.

``base_functions.py`` has the normalizers, ``device.py`` what else the kernels share (the scores of a tile, what is visible),
``forward.py``, ``backward.py`` and ``decode.py`` attention, ``rows.py`` softpick over a vector, ``tuning.py`` the block sizes
as data, ``dispatch.py`` which kernel takes a call.
Nothing here is imported before a kernel is asked for: torch for the CPU comes without Triton. docs/kernels.md explains.
"""
