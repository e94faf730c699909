"""Quantities with units, as people type them: 10us, 100Gbps, 1KiB..1GiB."""

import re

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_BYTES = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_BYTES_PER_SECOND = {"bps": 1 / 8, "Kbps": 1e3 / 8, "Mbps": 1e6 / 8, "Gbps": 1e9 / 8, "Tbps": 1e12 / 8} | {
    f"{unit}/s": float(size) for unit, size in _BYTES.items()
}


def _read(text: str, units: dict[str, float] | dict[str, int], what: str) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([A-Za-z/]+)\s*", text)
    if match and match[2] in units:
        try:
            return float(match[1]) * units[match[2]]
        except ValueError:
            pass
    raise ValueError(f"{what} is a number and one of {', '.join(units)}, got {text!r}")


def seconds(text: str) -> float:
    """Seconds of "10us"."""
    return _read(text, _SECONDS, "a latency")


def bytes_per_second(text: str) -> float:
    """Bytes/s of "100Gbps" (bits) or "12.5GB/s" (bytes)."""
    return _read(text, _BYTES_PER_SECOND, "a bandwidth")


def sizes(text: str) -> list[int]:
    """Bytes of "64MiB", or of "1KiB..1GiB": from the first to the second in steps of 4."""
    ends = [int(_read(part, _BYTES, "a size")) for part in text.split("..")]
    if len(ends) > 2 or min(ends) < 1 or ends[0] > ends[-1]:
        raise ValueError(f"sizes are one or a range from small to large such as 1KiB..1GiB, got {text!r}")
    found = [ends[0]]
    while found[-1] * 4 <= ends[-1]:
        found.append(found[-1] * 4)
    return found


def size_text(nbytes: int) -> str:
    """A size for people."""
    power = next(p for p in range(4, -1, -1) if nbytes % 1024**p == 0)
    return f"{nbytes // 1024**power} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def time_text(value: float) -> str:
    """A time for people."""
    unit = next((unit for unit, size in _SECONDS.items() if value >= size), "ns")
    return f"{value / _SECONDS[unit]:.3g} {unit}"
