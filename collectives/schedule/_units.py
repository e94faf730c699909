"""Units of link capacity: bytes per second behind each name."""

from fractions import Fraction

# unit -> bytes per second of one unit of capacity (decimal prefixes, as vendors and NCCL count)
BYTES_PER_SECOND = {
    "B/s": Fraction(1),
    "GB/s": Fraction(10**9),
    "Gbit/s": Fraction(10**9, 8),
    "Mbit/s": Fraction(10**6, 8),
}


def bytes_per_second(unit: str | None) -> Fraction:
    """Bytes per second of one unit of capacity.

    Raises:
        ValueError: there is no unit, so capacities say nothing about seconds.
    """
    if unit is None:
        raise ValueError(
            "seconds need a unit of capacity, but this network has none: "
            f'set "unit" to one of {", ".join(BYTES_PER_SECOND)}'
        )
    return BYTES_PER_SECOND[unit]


def check_unit(unit: str | None) -> None:
    """Refuse a unit that is not known."""
    if unit is not None and (not isinstance(unit, str) or unit not in BYTES_PER_SECOND):
        raise ValueError(f"unit must be one of {', '.join(BYTES_PER_SECOND)}, got {unit!r}")
