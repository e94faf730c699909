"""Tasks small enough for one CPU core, unlike each other, and their two halves. Nothing is downloaded.

From scratch and fine-tuning; SGD, AdamW, Adafactor, Muon; classification, regression on any scale, language, a VAE, batch
normalisation with slow and fast running averages, a loss with a schedule of its own.
"""

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tasks import Batches, Layer, Task, adamw, layers, sgd
from torch import Tensor, nn
from torch.nn import functional as F

# Nine rates around a task's own centre, in half decades.
GRID = tuple(10.0 ** (0.5 * i) for i in range(-4, 5))


def task(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    draw: Callable[[torch.Generator], Any],
    valid: list[Any],
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer],
    centre: float,
    steps: int,
    seed: int,
) -> Task:
    """A task whose cosine grid is seven rates around `centre`."""
    grid = tuple(centre * g for g in GRID[1:-1])
    return Task(model, loss, Batches(draw, 7000 + seed), valid, optimizer, centre, grid, steps)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(seed: int, spread: float = 1.0, shift: float = 0.0) -> Callable[..., tuple[Tensor, Tensor]]:
    """Draws (x [rows, 24], class of 10): three centres a class; `shift` moves the centres, for fine-tuning."""
    g = seeded(seed)
    centres = torch.randn(30, 24, generator=g)
    centres = centres + shift * torch.randn(30, 24, generator=g)

    def draw(generator: torch.Generator, rows: int = 64) -> tuple[Tensor, Tensor]:
        which = torch.randint(30, (rows,), generator=generator)
        return centres[which] + spread * torch.randn(rows, 24, generator=generator), which % 10

    return draw


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def clusters_sgd(seed: int, device: str = "cpu") -> Task:
    """Classification, SGD with momentum."""
    draw = clusters(1, 1.2)
    torch.manual_seed(seed)
    model = layers(24, 96, 96, 10, between=lambda _: [nn.ReLU()])
    return task(model, cross_entropy, draw, [draw(seeded(2), 2048)], sgd(device, momentum=0.9), 0.03, 800, seed)


def clusters_adamw(seed: int, device: str = "cpu") -> Task:
    """Classification with dropout, AdamW."""
    draw = clusters(3, 1.5)
    torch.manual_seed(seed)
    model = layers(24, 128, 128, 10, between=lambda _: [nn.GELU(), nn.Dropout(0.1)])
    return task(model, cross_entropy, draw, [draw(seeded(2), 2048)], adamw(device, 0.01), 3e-3, 800, seed)


def logistic(seed: int, device: str = "cpu") -> Task:
    """A convex task: logistic regression on badly scaled features, plain SGD."""
    scale = torch.logspace(-1.0, 0.5, 24)
    plain = clusters(4, 1.5)

    def draw(generator: torch.Generator, rows: int = 32) -> tuple[Tensor, Tensor]:
        x, y = plain(generator, rows)
        return x * scale, y

    torch.manual_seed(seed)
    return task(nn.Linear(24, 10), cross_entropy, draw, [draw(seeded(2), 2048)], sgd(device), 0.1, 800, seed)


def surface(seed: int, scale: float, offset: float, noise: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """Draws (x [rows, 12], y [rows, 1]): a smooth function in the unit `scale` around `offset`."""
    g = seeded(seed)
    w, v = torch.randn(12, 32, generator=g) / 2, torch.randn(32, 1, generator=g) / 4

    def draw(generator: torch.Generator, rows: int = 32) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 12, generator=generator)
        y = torch.tanh(x @ w) @ v
        return x, offset + scale * (y + noise * torch.randn(rows, 1, generator=generator))

    return draw


def regression_raw(seed: int, device: str = "cpu") -> Task:
    """Regression on targets of about 150 with a deviation of 75, SGD with momentum."""
    draw = surface(5, 75.0, 150.0, 0.2)
    torch.manual_seed(seed)
    model = layers(12, 64, 64, 1, between=lambda _: [nn.ReLU()])
    return task(model, squared, draw, [draw(seeded(2), 2048)], sgd(device, momentum=0.9), 1e-5, 800, seed)


def regression_small(seed: int, device: str = "cpu") -> Task:
    """Regression on targets of about a thousandth, AdamW."""
    draw = surface(6, 1e-3, 2e-3, 0.1)
    torch.manual_seed(seed)
    model = layers(12, 64, 64, 1, between=lambda _: [nn.Tanh()])
    return task(model, squared, draw, [draw(seeded(2), 2048)], adamw(device, 0.0), 1e-3, 800, seed)


def regression_sgd(seed: int, device: str = "cpu") -> Task:
    """Regression on scaled targets, plain SGD."""
    draw = surface(7, 1.0, 0.0, 0.1)
    torch.manual_seed(seed)
    model = layers(12, 96, 1, between=lambda _: [nn.Tanh()])
    return task(model, squared, draw, [draw(seeded(2), 2048)], sgd(device), 0.1, 1000, seed)


def adafactor(seed: int, device: str = "cpu") -> Task:
    """Regression, Adafactor."""
    draw = surface(8, 1.0, 0.5, 0.1)
    torch.manual_seed(seed)
    model = layers(12, 96, 96, 1, between=lambda _: [nn.GELU()])

    def make(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(model.parameters(), rate)

    return task(model, squared, draw, [draw(seeded(2), 2048)], make, 1e-2, 600, seed)


class Chain(nn.Module):
    """A causal transformer on symbols."""

    def __init__(self, symbols: int, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.body = nn.Sequential(*(Layer(width, 2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.symbols(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.body(x)))


# Texts of a chain; the first ones are never trained on.
_TEXTS, _HELD_OUT = 8192, 256


@cache
def text(seed: int, symbols: int = 10, length: int = 24) -> Callable[..., Tensor]:
    """Draws [rows, length] of a second-order Markov chain: the next symbol depends on the last two."""
    g = seeded(seed)
    table = torch.distributions.Dirichlet(torch.full((symbols,), 0.15))
    torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=g)))
    chances = table.sample((symbols, symbols))

    columns = list(torch.randint(symbols, (2, _TEXTS), generator=g))
    for _ in range(length - 2):
        columns.append(torch.multinomial(chances[columns[-2], columns[-1]], 1, generator=g)[:, 0])
    texts = torch.stack(columns, 1)

    def draw(generator: torch.Generator, rows: int = 16) -> Tensor:
        if rows == _HELD_OUT:
            return texts[:rows]
        return texts[torch.randint(_HELD_OUT, _TEXTS, (rows,), generator=generator)]

    return draw


def next_symbol(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def language_adamw(seed: int, device: str = "cpu") -> Task:
    """A small transformer, AdamW."""
    draw = text(11)
    torch.manual_seed(seed)
    made = adamw(device, 0.1, betas=(0.9, 0.95))
    return task(Chain(10, 32, 2, 24), next_symbol, draw, [draw(seeded(2), _HELD_OUT)], made, 3e-3, 600, seed)


def language_sgd(seed: int, device: str = "cpu") -> Task:
    """A small transformer, SGD with momentum."""
    draw = text(12)
    torch.manual_seed(seed)
    return task(
        Chain(10, 32, 1, 24), next_symbol, draw, [draw(seeded(2), _HELD_OUT)], sgd(device, momentum=0.9), 0.1, 600, seed
    )


def language_muon(seed: int, device: str = "cpu") -> Task:
    """A recurrent reader of which only matrices are trained, Muon."""
    draw = text(13)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.symbols = nn.Embedding(10, 48)
            self.body = nn.Sequential(
                nn.Linear(48 * 2, 96, bias=False), nn.GELU(), nn.Linear(96, 96, bias=False), nn.GELU()
            )
            self.head = nn.Linear(96, 10, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.symbols(tokens)
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            return self.head(self.body(torch.cat([x, before], -1)))

    torch.manual_seed(seed)

    def make(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.Muon(model.parameters(), rate, weight_decay=0.0)

    return task(Reader(), next_symbol, draw, [draw(seeded(2), _HELD_OUT)], make, 1e-2, 500, seed)


def normalised(seed: int, device: str, momentum: float, make: Any, centre: float) -> Task:
    """Convolutions with batch normalisation on pictures of gratings under noise."""
    angles = torch.linspace(0, math.pi, 9)[:8]
    rows = torch.linspace(-1.0, 1.0, 8)

    def draw(generator: torch.Generator, count: int = 32) -> tuple[Tensor, Tensor]:
        kind = torch.randint(8, (count,), generator=generator)
        phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
        a = angles[kind][:, None, None]
        wave = torch.sin(5 * (torch.cos(a) * rows[None, :, None] + torch.sin(a) * rows[None, None, :]) + phase)
        return (wave + 0.9 * torch.randn(count, 8, 8, generator=generator))[:, None], kind

    torch.manual_seed(seed)
    body: list[nn.Module] = []
    for inputs in (1, 12, 12):
        body += [nn.Conv2d(inputs, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12, momentum=momentum), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 8))
    return task(model, cross_entropy, draw, [draw(seeded(2), 1024)], make, centre, 500, seed)


def batchnorm_fast(seed: int, device: str = "cpu") -> Task:
    """Running averages of ten batches, SGD with momentum."""
    return normalised(seed, device, 0.1, sgd(device, momentum=0.9, weight_decay=5e-4), 0.1)


def batchnorm_slow(seed: int, device: str = "cpu") -> Task:
    """Running averages of two hundred batches, AdamW."""
    return normalised(seed, device, 0.005, adamw(device, 0.01), 3e-3)


def vae(seed: int, device: str = "cpu") -> Task:
    """A variational autoencoder whose loss has a schedule of its own: the divergence's weight grows for 200 steps."""
    g = seeded(21)
    mix = torch.randn(4, 32, generator=g)

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = layers(32, 64, 12, between=lambda _: [nn.GELU()])
            self.decoder = layers(6, 64, 32, between=lambda _: [nn.GELU()])
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            mean, log_std = self.encoder(x).chunk(2, -1)
            if self.training:
                self.seen += 1
            weight = (self.seen / 200).clamp(max=1.0)
            code = mean + log_std.exp() * torch.randn_like(mean)
            divergence = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)
            return ((self.decoder(code) - x) ** 2).sum(-1).mean() + weight * divergence.mean()

    def draw(generator: torch.Generator, rows: int = 64) -> Tensor:
        code = torch.randn(rows, 4, generator=generator)
        return torch.tanh(code @ mix) + 0.2 * torch.randn(rows, 32, generator=generator)

    torch.manual_seed(seed)
    return task(VAE(), lambda m, b: m(b), draw, [draw(seeded(2), 2048)], adamw(device, 0.0), 3e-3, 800, seed)


# Where runs, and models trained beforehand, are kept.
RUNS = Path(os.environ.get("AUTOLRS_RUNS", "runs/autolrs"))


def pretrained(name: str, fresh: Task, rate: float) -> nn.Module:
    """`fresh`'s model trained along a trapezoidal schedule, from a file after the first time."""
    path = RUNS / "pretrained" / f"{name}.pt"
    if path.exists():
        fresh.model.load_state_dict(torch.load(path, weights_only=True))
        return fresh.model
    optimizer = fresh.optimizer(fresh.model, rate)
    stream = iter(fresh.loader)
    for step in range(fresh.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 1.0, (fresh.steps - step) / (0.5 * fresh.steps))
        optimizer.zero_grad()
        fresh.loss(fresh.model, next(stream)).backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(fresh.model.state_dict(), part)
    os.replace(part, path)
    return fresh.model


def finetune_clusters(seed: int, device: str = "cpu") -> Task:
    """A trained classifier goes on with centres that moved a little, AdamW."""
    model = pretrained(f"clusters_adamw.{seed}", clusters_adamw(900 + seed), 3e-3)
    draw = clusters(3, 1.5, shift=0.5)
    return task(model, cross_entropy, draw, [draw(seeded(2), 2048)], adamw(device, 0.01), 1e-3, 500, seed)


def finetune_language(seed: int, device: str = "cpu") -> Task:
    """A trained transformer goes on with a text of which every fourth rule has changed, AdamW."""
    model = pretrained(f"language_adamw.{seed}", language_adamw(900 + seed), 3e-3)
    old, new = text(11), text(14)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.cat([old(generator, 12), new(generator, 4)])

    made = adamw(device, 0.01)
    valid = [torch.cat([old(seeded(2), _HELD_OUT)[:192], new(seeded(2), _HELD_OUT)[:64]])]
    return task(model, next_symbol, draw, valid, made, 1e-3, 400, seed)


def finetune_sgd(seed: int, device: str = "cpu") -> Task:
    """A trained convolutional network goes on with other labels, SGD with momentum."""
    model = pretrained(f"batchnorm_fast.{seed}", batchnorm_fast(900 + seed), 0.1)
    base = batchnorm_fast(seed)
    order = torch.randperm(8, generator=seeded(31))

    def draw(generator: torch.Generator, count: int = 32) -> tuple[Tensor, Tensor]:
        x, kind = base.loader._draw(generator, count)
        return x, order[kind]

    made = sgd(device, momentum=0.9)
    return task(model, cross_entropy, draw, [draw(seeded(2), 1024)], made, 0.03, 400, seed)


LIBRARY = {
    made.__name__: made
    for made in (
        clusters_sgd,
        clusters_adamw,
        logistic,
        regression_raw,
        regression_small,
        regression_sgd,
        adafactor,
        language_adamw,
        language_sgd,
        language_muon,
        batchnorm_fast,
        batchnorm_slow,
        vae,
        finetune_clusters,
        finetune_language,
        finetune_sgd,
    )
}

# Every choice of the method was made by looking at these tasks, ...
DEVELOPMENT = (
    "adafactor", "batchnorm_slow", "clusters_adamw", "digits", "finetune_language", "finetune_sgd",
    "language_sgd", "lstm", "regression_raw", "regression_small", "teacher",
)  # fmt: skip
# ... and none by looking at these.
HELD_OUT = (
    "autoencoder", "batchnorm_fast", "clusters_sgd", "finetune_clusters", "language_adamw", "language_muon",
    "logistic", "quadrics", "regression_sgd", "vae", "waves",
)  # fmt: skip
