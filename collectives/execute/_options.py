"""How schedules run: one set of options for the hook, the strategy, the backend and the runner."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

Transports = Literal["auto", "tcp", "gloo", "nccl"]
TRANSPORTS: tuple[Transports, ...] = ("auto", "tcp", "gloo", "nccl")
DEFAULT_TIMEOUT_S = 30.0
_LONGEST_S = 30 * 86400.0
_RENAMED = {"deadline_s": "timeout_s"}


@dataclass(frozen=True)
class ForestOptions:
    """Options of `ForestState`, `ForestStrategy`, `Runner` and `register_backend`.

    Raises:
        ValueError: a value is outside its range.

    Example:
        >>> ForestOptions(timeout_s=60, interface="eth1").transport
        'auto'
    """

    ranks: Mapping[str, int] | None = None
    """Compute node -> rank; None takes the order of the compute nodes."""
    timeout_s: float | None = None
    """Seconds without progress after which a collective fails with a named error on every rank. None: 30, and for the
    backend what `init_process_group(timeout=)` says."""
    fallback: Literal["error", "allreduce"] = "error"
    """"allreduce" goes on with the process group's all-reduce when the schedule's connections fail (buckets in host
    memory); "error" raises. The backend has "error" alone."""
    transport: Transports = "auto"
    """"tcp" (own connections, native), "gloo" or "nccl" (the process group's messages). "auto" takes "nccl" for tensors
    on a GPU and "tcp" for those in host memory."""
    interface: str | None = None
    """Network interface, or this machine's address, to be reached at; None takes GLOO_SOCKET_IFNAME's, or the one that
    leads to the other ranks."""
    chunk_bytes: int | None = None
    """With a network: the least that is worth a message of its own. None: 32 KiB in host memory, 64 MiB on GPUs, where a
    message takes longer to start than to send."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0 < self.timeout_s <= _LONGEST_S:
            raise ValueError(f"timeout_s must be seconds above 0, at most 30 days, got {self.timeout_s!r}")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.fallback not in ("error", "allreduce"):
            raise ValueError(f'fallback must be "error" or "allreduce", got {self.fallback!r}')
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, got {self.chunk_bytes}")

    @property
    def patience_s(self) -> float:
        """`timeout_s`, or its default."""
        return DEFAULT_TIMEOUT_S if self.timeout_s is None else self.timeout_s


Options = TypeVar("Options")


def options_of(kind: type[Options], given: Options | None, settings: Mapping[str, Any], who: str) -> Options:
    """Options that were given as a whole, changed by those given one by one.

    Args:
        kind: a frozen dataclass.
        given: the options; None takes the defaults.
        settings: name -> value.
        who: takes them; for the error.

    Raises:
        TypeError: there is no such option.
        ValueError: a value is outside its range.
    """
    changes = dict(settings)
    for old, new in _RENAMED.items():
        if old in changes:
            warnings.warn(f"{old}= is now {new}=", DeprecationWarning, stacklevel=3)
            changes[new] = changes.pop(old)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            raise TypeError(f"{who} has no option {name!r}; its options are {', '.join(known)}")
    return replace(kind() if given is None else given, **changes)  # type: ignore[type-var]
