"""The Callback class of the Lightning package in use: `pytorch_lightning` and `lightning` are two packages."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or not ("lightning.pytorch" in sys.modules and "pytorch_lightning" not in sys.modules):
    from pytorch_lightning import Callback as Callback
else:
    from lightning.pytorch import Callback as Callback
