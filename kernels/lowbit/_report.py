"""What `quantize_` did: a row a layer, exact bits a weight, and why the rest was left."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer."""

    name: str
    method: str
    """Name of the configuration; empty where the layer was left."""
    weights: int
    """Numbers in its matrix."""
    nbytes: int
    """Bytes that they take now: codes, scales, outliers, order of channels."""
    dense_nbytes: int
    """Bytes before."""
    reason: str = ""
    """Why it was left."""

    @property
    def bits(self) -> float:
        """Exact bits a weight."""
        return 8 * self.nbytes / self.weights


@dataclasses.dataclass(frozen=True)
class Report:
    """A table when printed."""

    rows: tuple[Row, ...]
    kv_bits: int
    """Bits that cached keys and values are to have."""
    backend: str
    """What multiplies: the kernels, or the reference and why."""

    @property
    def quantised(self) -> tuple[Row, ...]:
        """Layers that were quantised."""
        return tuple(row for row in self.rows if row.method)

    @property
    def left(self) -> dict[str, str]:
        """Layers that were not, and why."""
        return {row.name: row.reason for row in self.rows if not row.method}

    @property
    def bits(self) -> float:
        """Bits a weight over all quantised layers."""
        return 8 * sum(r.nbytes for r in self.quantised) / max(sum(r.weights for r in self.quantised), 1)

    @property
    def ratio(self) -> float:
        """Bytes of the quantised layers over their bytes before."""
        return sum(r.nbytes for r in self.quantised) / max(sum(r.dense_nbytes for r in self.quantised), 1)

    def __str__(self) -> str:
        lines = [(row.name, row.method or "left", f"{row.bits:.3f}", row.reason) for row in self.rows]
        lines.insert(0, ("layer", "method", "bits", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines]
        done = len(self.quantised)
        table.append(
            f"{done} of {len(self.rows)} quantised, {self.bits:.3f} bits a weight, {self.ratio:.3f} of the bytes"
        )
        table.append(f"keys and values: {self.kv_bits} bits; products: {self.backend}")
        return "\n".join(table)
