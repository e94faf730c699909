"""The training tasks. Nothing is downloaded.

The search's constants were chosen on digits, teacher and student, and a byte-level GPT (for a GPU); the other four check
that they were not chosen for these three.
"""

import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Task:
    """A model, its data and its default rate."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    loader: Any
    valid: list[Any]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    default: float
    grid: tuple[float, ...]
    steps: int
    every: int = 25  # charged steps between validations


def adamw(device: str, decay: float, **kwargs: Any) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """AdamW for a model on `device`; on a GPU its step can be captured and its rate filled in place."""

    def make(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        cuda = device == "cuda"
        held = torch.tensor(rate, device=device) if cuda else rate
        return torch.optim.AdamW(model.parameters(), held, weight_decay=decay, fused=cuda, capturable=cuda, **kwargs)

    return make


def sgd(device: str, **kwargs: Any) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """SGD, likewise."""

    def make(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        cuda = device == "cuda"
        held = torch.tensor(rate, device=device) if cuda else rate
        return torch.optim.SGD(model.parameters(), held, fused=cuda, **kwargs)

    return make


class Batches:
    """Endless shuffled batches, the same for the same seed."""

    def __init__(self, draw: Callable[[torch.Generator], Any], seed: int) -> None:
        self._draw, self._seed = draw, seed

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield self._draw(generator)


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def digits(seed: int, device: str) -> Task:
    """scikit-learn's 8 x 8 digits, a small ResNet, SGD with momentum."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16),
        Block(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(device)
    held = (x[test] + 0.3 * torch.randn(x[test].shape, generator=torch.Generator().manual_seed(1)), y[test])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Shifts and noise: without them every schedule reaches the same near-zero training loss and then overfits.
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        down, right = (int(v) for v in torch.randint(-1, 2, (2,), generator=generator))
        images = torch.roll(x[rows], (down, right), (2, 3))
        return (images + 0.3 * torch.randn(images.shape, generator=generator)).to(device), y[rows].to(device)

    return Task(
        model,
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        Batches(draw, seed),
        [tuple(t.to(device) for t in held)],
        sgd(device, momentum=0.9, weight_decay=5e-4),
        0.03,
        (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8),
        800,
    )


def teacher(seed: int, device: str) -> Task:
    """A student learns a fixed random network on fresh data: the validation loss is the true one."""
    generator = torch.Generator().manual_seed(7)
    w1, w2 = torch.randn(32, 64, generator=generator) / math.sqrt(32), torch.randn(64, 1, generator=generator) / 8

    def target(x: Tensor) -> Tensor:
        return torch.tanh(2 * x @ w1) @ w2

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)).to(device)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 32, generator=generator)
        return x.to(device), (target(x) + 0.1 * torch.randn(64, 1, generator=generator)).to(device)

    held = torch.randn(4096, 32, generator=torch.Generator().manual_seed(8))
    return Task(
        model,
        lambda m, b: F.mse_loss(m(b[0]), b[1]),
        Batches(draw, 1000 + seed),
        [(held.to(device), target(held).to(device))],
        adamw(device, 0.01),
        1e-3,
        (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        1500,
    )


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = (
            heads,
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, w))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class ByteGPT(nn.Module):
    """A byte-level GPT of about 10 million parameters."""

    def __init__(self, width: int = 320, layers: int = 8, heads: int = 5, context: int = 256) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))


def byte_gpt(seed: int, device: str, *, steps: int = 2000, batch: int = 16, **shape: int) -> Task:
    """The running Python's standard library as bytes, split by file; bf16. On a GPU the step can be captured."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [f for f in files if "site-packages" not in f.parts and "test" not in f.parts]
    texts = [torch.frombuffer(bytearray(f.read_bytes() or b"\n"), dtype=torch.uint8) for f in files]
    valid = torch.cat(texts[::20]).to(device)
    train = torch.cat([t for i, t in enumerate(texts) if i % 20]).to(device)
    torch.manual_seed(seed)
    model = ByteGPT(**shape).to(device)
    if device == "cuda":
        for layer in model.layers:
            layer.compile()
    context = model.places.num_embeddings
    window = torch.arange(context + 1, device=device)

    def cut(data: Tensor, size: int, generator: torch.Generator) -> Tensor:
        at = torch.randint(len(data) - context - 1, (size,), generator=generator).to(device)
        return data[at[:, None] + window].long()

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        # a cast that autocast remembered from one captured step would be stale in the next
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            logits = m(b[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), b[:, 1:].flatten())

    held_out = torch.Generator().manual_seed(9)
    return Task(
        model,
        loss,
        Batches(lambda g: cut(train, batch, g), 2000 + seed),
        [cut(valid, batch, held_out) for _ in range(8)],
        adamw(device, 0.1, betas=(0.9, 0.95)),
        1e-3,
        (1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        steps,
        every=50,
    )


def byte_gpt_tiny(seed: int, device: str) -> Task:
    """The same, small enough for a CPU: to try the script."""
    return byte_gpt(seed, device, steps=60, batch=4, width=32, layers=2, heads=2, context=32)


class Reader(nn.Module):
    """An LSTM that reads symbols and says the next one."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.symbols(x))[0])


def lstm(seed: int, device: str) -> Task:
    """Text of a random second-order Markov chain, an LSTM, AdamW."""
    chain = torch.softmax(2.5 * torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(3)), -1)
    torch.manual_seed(seed)
    model = Reader(12, 64).to(device)

    def text(generator: torch.Generator, rows: int) -> Tensor:
        columns = list(torch.randint(12, (rows, 2), generator=generator).T)
        for _ in range(30):
            columns.append(torch.multinomial(chain[columns[-2], columns[-1]], 1, generator=generator)[:, 0])
        return torch.stack(columns, 1).to(device)

    return Task(
        model,
        lambda m, b: F.cross_entropy(m(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()),
        Batches(lambda g: text(g, 16), 50 + seed),
        [text(torch.Generator().manual_seed(4), 256)],
        adamw(device, 0.01),
        1e-3,
        (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        1000,
    )


def layers(*widths: int, between: Callable[[int], list[nn.Module]]) -> nn.Sequential:
    """Linear layers with others between them."""
    found: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        found += [nn.Linear(inputs, outputs), *(between(outputs) if i < len(widths) - 2 else [])]
    return nn.Sequential(*found)


def quadrics(seed: int, device: str) -> Task:
    """The signs of four random quadratic forms as sixteen classes, an MLP with layer norms, SGD with momentum."""
    forms = torch.randn(4, 20, 20, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(seed)
    model = layers(20, 128, 128, 16, between=lambda width: [nn.LayerNorm(width), nn.ReLU()]).to(device)

    def draw(generator: torch.Generator, rows: int = 64) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 20, generator=generator)
        signs = torch.einsum("bi,kij,bj->bk", x, forms, x) > 0
        return x.to(device), (signs.long() * torch.tensor([1, 2, 4, 8])).sum(1).to(device)

    return Task(
        model,
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        Batches(draw, 90 + seed),
        [draw(torch.Generator().manual_seed(6), 4096)],
        sgd(device, momentum=0.9, weight_decay=1e-4),
        0.1,
        (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8),
        1500,
    )


def autoencoder(seed: int, device: str) -> Task:
    """scikit-learn's digits under noise through eight units, AdamW."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = x[order[:1400]], x[order[1400:]].to(device)
    torch.manual_seed(seed)
    halves = [layers(64, 128, 8, between=lambda _: [nn.GELU()]), layers(8, 128, 64, between=lambda _: [nn.GELU()])]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clean = train[torch.randint(len(train), (32,), generator=generator)]
        return (clean + 0.1 * torch.randn(clean.shape, generator=generator)).to(device), clean.to(device)

    return Task(
        nn.Sequential(*halves).to(device),
        lambda m, b: F.mse_loss(m(b[0]), b[1]) * 10,
        Batches(draw, 70 + seed),
        [(test, test)],
        adamw(device, 0.0),
        1e-3,
        (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        1500,
    )


def waves(seed: int, device: str) -> Task:
    """A sum of random waves, a tanh MLP, plain SGD."""
    generator = torch.Generator().manual_seed(15)
    ways, phases = torch.randn(10, 24, generator=generator), 6 * torch.rand(24, generator=generator)
    heights = torch.randn(24, 1, generator=generator) / 5
    torch.manual_seed(seed)
    model = layers(10, 96, 96, 1, between=lambda _: [nn.Tanh()]).to(device)

    def draw(generator: torch.Generator, rows: int = 64, noise: float = 0.05) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 10, generator=generator)
        y = torch.sin(0.5 * x @ ways + phases) @ heights
        return x.to(device), (y + noise * torch.randn(rows, 1, generator=generator)).to(device)

    return Task(
        model,
        lambda m, b: F.mse_loss(m(b[0]), b[1]),
        Batches(draw, 30 + seed),
        [draw(torch.Generator().manual_seed(16), 4096, noise=0.0)],
        sgd(device),
        0.1,
        (0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0),
        2000,
    )


TASKS = {
    "digits": digits,
    "teacher": teacher,
    "bytes": byte_gpt,
    "bytes-tiny": byte_gpt_tiny,
    "lstm": lstm,
    "quadrics": quadrics,
    "autoencoder": autoencoder,
    "waves": waves,
}
# Those of the last report that a CPU can run.
