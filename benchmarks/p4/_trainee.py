"""One rank of a short DDP training of the demo's tiny GPT, its gradients summed by a switch; prints a digest.

python _trainee.py RANK '{"switch": "10.0.0.254:48864", "meet": "tcp://10.0.0.1:29500", "steps": 20, "elements": 256}'
"""

import hashlib
import json
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.demo._config import SIZES
from trainkit.demo._model import GPT
from trainkit.switchml import SwitchMLState, switchml_hook

rank, job = int(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
size = SIZES["tiny"]
dist.init_process_group("gloo", init_method=job["meet"], rank=rank, world_size=2)
torch.manual_seed(0)
model = GPT(size, 256, rate=1e-3)
ddp = DistributedDataParallel(model, find_unused_parameters=True)
state = SwitchMLState(job["switch"], profile="core", elements=job["elements"], slots=16, timeout_s=60)
ddp.register_comm_hook(state, switchml_hook)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = torch.Generator().manual_seed(rank)
state.connect()
started = time.monotonic()
for _ in range(job["steps"]):
    tokens = torch.randint(0, 256, (size.batch, size.context + 1), generator=data)
    loss = torch.nn.functional.cross_entropy(ddp(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
seconds = time.monotonic() - started
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
print(json.dumps({"digest": digest, "loss": loss.item(), "seconds": seconds, **state.counters()}), flush=True)
dist.barrier()
state.close()
dist.destroy_process_group()
