"""scikit-optimize as the search: the paper's own choice, kept for fidelity."""

import math
import warnings
from typing import Any

from trainkit.autolrs._search import check_range


class SkoptSearch:
    """`skopt.Optimizer` over one log-uniform rate, a fresh one per stage as the authors' code has it.

    Args:
        low: least rate.
        high: greatest rate.
        seed: random state of the optimiser.
        kappa: of the lower confidence bound. The authors' code uses 1e6, which ignores the mean: pure space filling.

    Raises:
        ValueError: unless 0 < low < high.
    """

    def __init__(self, low: float, high: float, seed: int = 0, *, kappa: float = 1e6) -> None:
        check_range(low, high)
        self.low, self.high, self.seed, self.kappa = low, high, seed, kappa
        self._stage = 0
        self._told: list[tuple[float, float, float]] = []
        self._optimizer = self._fresh()

    def _fresh(self) -> Any:
        from skopt import Optimizer
        from skopt.space import Real

        return Optimizer(
            [Real(self.low, self.high, "log-uniform")],
            "GP",
            n_initial_points=1,
            acq_func="LCB",
            acq_func_kwargs={"kappa": self.kappa},
            random_state=self.seed + self._stage,
        )

    def ask(self) -> float:
        """The next rate to try."""
        return min(max(float(self._optimizer.ask()[0]), self.low), self.high)

    def tell(self, lr: float, mean: float, std: float) -> None:
        """Reports a trial; skopt takes no noise per point, and a non-finite value becomes the worst finite one."""
        self._told.append((float(lr), float(mean), float(std)))
        finite = [m for _, m, _ in self._told if math.isfinite(m)]
        value = float(mean) if math.isfinite(mean) else (max(finite) if finite else 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's notes on length scales at their bounds
            self._optimizer.tell([min(max(lr, self.low), self.high)], value)

    def best(self) -> float:
        """The tried rate with the least forecast; the middle of the range before any finite trial."""
        finite = [(m, lr) for lr, m, _ in self._told if math.isfinite(m)]
        return min(finite)[1] if finite else math.sqrt(self.low * self.high)

    def next_stage(self, chosen: float | None = None) -> None:
        """Forgets everything, as the published algorithm does."""
        self._stage += 1
        self._told = []
        self._optimizer = self._fresh()

    def state_dict(self) -> dict[str, Any]:
        """The told points; the optimiser is rebuilt from them."""
        return {"told": list(self._told), "stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tells a fresh optimiser the same points again; the next ask is the same as there."""
        self._stage = int(state["stage"])
        self._told = []
        self._optimizer = self._fresh()
        for lr, mean, std in state["told"]:
            self.ask()
            self.tell(lr, mean, std)
