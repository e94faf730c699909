"""A LightningModule to serve."""

import torch
from pytorch_lightning import LightningModule


class Doubler(LightningModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def predict_step(self, batch, batch_idx):
        return batch * self.scale


class Named(LightningModule):
    def predict_step(self, batch, batch_idx):
        return {"sum": batch["x"].sum(-1), "pair": (batch["x"].max(-1).values, batch["x"])}
