"""A LightningModule to serve."""

import torch
from pytorch_lightning import LightningModule


class Doubler(LightningModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def predict_step(self, batch, batch_idx):
        return batch * self.scale
