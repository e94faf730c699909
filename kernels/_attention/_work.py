"""The list of work that a plan gives the kernels: its form, known with and without Triton."""

ITEM = 5
"""Numbers of a listed piece of work: see `_call.packed_tiles`."""
