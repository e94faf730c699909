"""The options of AutoLRS and Tuner, once."""

from dataclasses import dataclass
from typing import Literal

from trainkit.autolrs._search import check_range


@dataclass(frozen=True)
class Options:
    """What a user may choose; AutoLRS and Tuner take the same names.

    Attributes:
        low: least rate to try, for the parameter group with the greatest default.
        high: greatest rate to try.
        stage_steps: committed steps between searches, each for a stage at one constant rate; None: planned.
        trial_steps: steps of a trial at most; None: planned.
        candidates: rates tried per search at most; None: planned.
        budget: greatest share of all optimizer steps that may be discarded.
        count: "kept": the run's length bounds the committed steps; "all": committed and discarded steps together.
        warmup_steps: linear warmup that multiplies every rate, trials included; None: 2 % of the run.
        backend: "gp": own Gaussian process; "skopt": scikit-optimize.
        preset: "default": Bayesian with forecasts of the run's end; "paper": the published algorithm.
        seed: of the search; the same seed asks the same rates.
        memory_mib: MiB of batches that a search may hold; trials that need more end earlier.
    """

    low: float = 1e-5
    high: float = 1.0
    stage_steps: int | None = None
    trial_steps: int | None = None
    candidates: int | None = None
    budget: float = 0.35
    count: Literal["kept", "all"] = "kept"
    warmup_steps: int | None = None
    backend: Literal["gp", "skopt"] = "gp"
    preset: Literal["default", "paper"] = "default"
    seed: int = 0
    memory_mib: int = 256

    def check(self) -> None:
        """Raises ValueError with the rule, the value and the fix for the first option that breaks one."""
        check_range(self.low, self.high)
        for name in ("stage_steps", "trial_steps", "candidates"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive int or None (planned), but got {value!r}: leave it None")
        if self.stage_steps is not None and self.trial_steps is not None and self.trial_steps > self.stage_steps:
            raise ValueError(
                f"a trial must not be longer than its stage, but got trial_steps={self.trial_steps} and "
                f"stage_steps={self.stage_steps}: shorten trials or lengthen stages"
            )
        if not 0.0 < self.budget < 1.0:
            raise ValueError(f"budget is a share of all steps, 0 < budget < 1, but got {self.budget!r}: try 0.35")
        for name, allowed in (
            ("count", ("kept", "all")),
            ("backend", ("gp", "skopt")),
            ("preset", ("default", "paper")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}")
        if self.warmup_steps is not None and (not isinstance(self.warmup_steps, int) or self.warmup_steps < 0):
            raise ValueError(
                f"warmup_steps must be an int of 0 or more, or None (2 % of the run), but got {self.warmup_steps!r}: "
                "0 turns warmup off"
            )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an int of 0 or more, but got {self.seed!r}: leave it 0")
        if not isinstance(self.memory_mib, int) or self.memory_mib < 1:
            raise ValueError(f"memory_mib must be an int of 1 or more, but got {self.memory_mib!r}: leave it 256")
