"""The other kernels that a training step spends its time in: norm, gate, rotary positions, loss."""
