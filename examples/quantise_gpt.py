"""A GPT in 4 bits: calibrate, quantise, look at the report, save, load.

python examples/quantise_gpt.py
"""

import tempfile

import torch

from trainkit.demo._config import SIZES
from trainkit.demo._model import GPT
from trainkit.kernels import W4A4, load_quantized, quantize_, save_quantized

torch.manual_seed(0)
model = GPT(SIZES["tiny"], 256, 1e-3).eval()
loader = [torch.randint(0, 256, (2, 64)) for _ in range(4)]
with torch.no_grad():
    before = model(loader[0])
print(quantize_(model, W4A4(keep_slower=True), loader))
with torch.no_grad():
    after = model(loader[0])
print(f"the logits moved by {float((after - before).norm() / before.norm()):.3f} of their size")
with tempfile.TemporaryDirectory() as folder:
    save_quantized(model, folder)
    again = load_quantized(GPT(SIZES["tiny"], 256, 1e-3).eval(), folder)
    with torch.no_grad():
        print("loaded again, equal:", torch.equal(again(loader[0]), after))
