"""PyTorch Lightning: the AutoLRS callback with its trials and replay, the strategies, the automatic network."""
