"""AutoLRS in a plain PyTorch loop, and the found schedule replayed.

Run: python examples/autolrs_plain.py
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainkit.autolrs import LRSchedule, Tuner

TRUTH = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))


def loader() -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of 50 batches."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        x = torch.randn(32, 16, generator=draw)
        yield x, torch.tanh(x @ TRUTH) + 0.1 * torch.randn(32, 1, generator=draw)


class Loader:
    """Can be iterated again and again."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return loader()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of a batch."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def main() -> None:
    """Finds the rates, then trains again with them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def train_step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    tuner = Tuner(model, optimizer, train_step, total_steps=400, loss=loss_of, count="all")
    for kept in tuner.run(Loader()):
        if kept.step % 50 == 0:
            print(f"step {kept.step}: rate {kept.rate:.2e}, loss {float(kept.loss):.3f}")
    tuner.schedule.save("lr.json")

    again = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-6, momentum=0.9)
    scheduler = LRSchedule.load("lr.json").scheduler(optimizer)
    for _ in range(8):
        for batch in Loader():
            optimizer.zero_grad()
            loss = loss_of(again, batch)
            loss.backward()
            optimizer.step()
            scheduler.step()
    print(f"replayed: loss {float(loss.detach()):.3f}")


if __name__ == "__main__":
    main()
