"""Whether the Triton that is installed is one that the kernels are written for."""

import importlib.util
from functools import cache

OLDEST = (3, 6)
"""Version from which on Triton has the knobs and the Gluon that the kernels use."""


@cache
def lacking() -> str | None:
    """Why Triton cannot be used, and what to do; None where it can."""
    oldest = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed (pip install 'triton>={oldest}')"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton must be {oldest} or newer, got {triton.__version__} (pip install 'triton>={oldest}')"
    return None
