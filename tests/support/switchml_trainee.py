"""One rank of a training of 20 steps, alone in its namespace: `python switchml_trainee.py SWITCH RANK WORLD OPTIONS`.

Gradients are averaged by the switch alone, without torch.distributed. Prints one JSON line: a digest of the parameters,
the counters, and what was logged.
"""

import hashlib
import json
import logging
import sys
import time

import torch

from trainkit.switchml import SwitchMLState


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(switch: str, rank: int, world: int, options: str) -> None:
    """Train and tell."""
    torch.set_num_threads(1)
    said = _Said()
    logging.getLogger("trainkit").addHandler(said)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    state = SwitchMLState(switch, rank=rank, world_size=world, **{"timeout_s": 20, **json.loads(options)})
    began = time.monotonic()
    seeded = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        images, labels = torch.randn(16, 64, generator=seeded), torch.randint(0, 10, (16,), generator=seeded)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        for index, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            averaged = state.average(parameter.grad.flatten(), index=index).wait()
            parameter.grad.copy_(averaged.view_as(parameter))
        optimizer.step()
        optimizer.zero_grad()
    link = state.connect()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    told = {
        "digest": digest,
        "elements": link.member.elements,
        "said": said.lines,
        "seconds": time.monotonic() - began,
        **state.counters(),
    }
    state.close()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
