"""The strategy over a DDPStrategy that is not pytorch_lightning's own."""

import pytest
from pytorch_lightning.strategies import DDPStrategy

from trainkit.integrations.lightning._strategies import SwitchMLStrategy, strategy_for


class Foreign:
    """Stands for another package's DDPStrategy."""

    def __init__(self, **ddp: object) -> None:
        self.ddp = ddp


def test_strategy_over_another_package() -> None:
    made = strategy_for(Foreign)("127.0.0.1:1", wire="int16", find_unused_parameters=True)
    assert isinstance(made, Foreign) and not isinstance(made, DDPStrategy)
    assert made.ddp["find_unused_parameters"] is True
    assert made.switchml_state.options.wire == "int16"
    assert isinstance(SwitchMLStrategy("127.0.0.1:1"), DDPStrategy)


def test_lightning_pytorch_trainer_takes_it() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    strategies = pytest.importorskip("lightning.pytorch.strategies")
    strategy = strategy_for(strategies.DDPStrategy)("127.0.0.1:1")
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    assert trainer.strategy is strategy
