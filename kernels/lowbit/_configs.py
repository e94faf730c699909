"""What a model's linear layers are to become: one frozen configuration a method."""

import dataclasses
from typing import Literal

GROUPS = (32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What all methods share."""

    gptq: bool = True
    """Whether each channel's rounding error is passed on to the channels after it (Frantar et al., 2023); needs a loader."""
    clip: float | None = None
    """Share of a group's maximum that the greatest code stands for; None searches it for every group."""
    seed: int = 0
    """Of the tokens on which the activations' clipping is searched."""
    progress: bool = True
    """Whether a bar shows the calibration."""
    keep_slower: bool = False
    """Whether layers are also quantised where the kernel is slower than 16 bits."""

    # What not every method lets its user choose.
    group = 0
    outliers = 0
    rotate = False
    kv_bits = 16

    def __post_init__(self) -> None:
        if self.group and self.group not in GROUPS:
            raise ValueError(f"group_size must be one of {', '.join(map(str, GROUPS))}, got {self.group}: choose one")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must lie in (0, 1], got {self.clip}: 1 clips nothing, None searches")
        if self.outliers is not None and (self.outliers < 0 or self.outliers % 16):
            raise ValueError(f"outliers must be a multiple of 16, got {self.outliers}: round it up, or give None")
        if self.rotate and self.outliers:
            raise ValueError(f"rotate=True takes the outliers' place, got outliers={self.outliers}: give one of them")
        if self.kv_bits not in (4, 16):
            raise ValueError(f"kv_bits must be 4 or 16, got {self.kv_bits}: choose one of them")

    @property
    def name(self) -> str:
        """The method's name."""
        return type(self).__name__

    def outliers_of(self, channels: int) -> int:
        """INT8 channels of a layer that has this many."""
        if self.outliers is not None or self.rotate:
            return self.outliers or 0
        return max(16, round(channels / 32 / 16) * 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class W4A4(Config):
    """Atom: 4-bit weights and activations, outlier channels in INT8 (Zhao et al., 2024)."""

    group_size: int = 128
    """Channels that share a scale, of weights and of activations: 32, 64 or 128."""
    outliers: int | None = None  # type: ignore[assignment]
    """INT8 channels, those with the greatest activations; None takes a 32nd of a layer's, at least 16."""
    kv_bits: int = 4
    """Bits of cached keys and values: 4 or 16; noted in `Report.kv_bits`, for a cache that can store them."""
    rotate: bool = False
    """Rotate the input by a Hadamard matrix instead of keeping outliers (Ashkboos et al., QuaRot, 2024)."""

    @property
    def group(self) -> int:  # type: ignore[override]
        """Channels that share a scale."""
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class W4A8(Config):
    """4-bit weights in groups, e4m3 activations with a scale a token."""

    group_size: int = 128
    """Channels that share a weight's scale: 32, 64 or 128."""

    @property
    def group(self) -> int:  # type: ignore[override]
        """Channels that share a scale."""
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class W4A16(Config):
    """4-bit weights in groups, 16-bit activations."""

    group_size: int = 128
    """Channels that share a weight's scale: 32, 64 or 128."""

    @property
    def group(self) -> int:  # type: ignore[override]
        """Channels that share a scale."""
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class W8A8(Config):
    """8-bit weights with a scale a row, 8-bit activations with a scale a token."""

    kind: Literal["fp8", "int8"] = "fp8"
    """e4m3 or INT8: Hopper multiplies INT8 hardly faster than bf16, e4m3 at twice its rate."""
    gptq: bool = False
    """As for the others; at 8 bits it changes little."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("fp8", "int8"):
            raise ValueError(f"kind must be fp8 or int8, got {self.kind!r}: choose one of them")
        if self.gptq and self.kind == "fp8":
            raise ValueError("gptq=True rounds to whole numbers, got kind='fp8': give gptq=False or kind='int8'")
