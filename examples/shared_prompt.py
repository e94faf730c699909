"""A policy-gradient step on a prompt with several samples, the prompt computed once.

The tokens lie in a tree, packed by `pack_samples`; attention follows it. The gradients are those of the repeated prompts.

    python examples/shared_prompt.py
"""

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from trainkit.kernels import pack_samples, register_transformers

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attn_implementation=register_transformers(),
)  # fmt: skip
model = LlamaForCausalLM(config)

# One prompt of 24 tokens, four samples, and what each is worth.
prompt = torch.randint(128, (24,)).tolist()
samples = [torch.randint(128, (n,)).tolist() for n in (9, 5, 12, 7)]
advantages = torch.tensor([1.0, -0.5, 0.3, -0.8])

batch = pack_samples([(prompt, samples)])
labels, of = batch.pop("labels")[0], batch.pop("samples")[0]
logits = model(**batch, use_cache=False).logits[0]
trained = labels >= 0
log_p = -functional.cross_entropy(logits[trained], labels[trained], reduction="none")
loss = -(log_p * advantages[of[trained]]).mean()
loss.backward()
packed = [p.grad.clone() for p in model.parameters()]

# The same, with the prompt before every sample.
model.zero_grad()
total = torch.zeros(())
for sample, advantage in zip(samples, advantages, strict=True):
    logits = model(torch.tensor([prompt + sample]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    total = total + functional.cross_entropy(logits, torch.tensor(sample), reduction="sum") * advantage
(total / trained.sum()).backward()
worst = max(float((a - p.grad).abs().max()) for a, p in zip(packed, model.parameters(), strict=True))

repeated = sum(len(prompt) + len(s) for s in samples)
print(f"tokens computed: {batch['input_ids'].shape[1]} instead of {repeated}")
print(f"loss {loss.item():.5f}; repeated {(total / trained.sum()).item():.5f}")
print(f"largest difference of a gradient: {'below 1e-6' if worst < 1e-6 else worst}")
