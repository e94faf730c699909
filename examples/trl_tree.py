"""TRL's tree packing on our kernels: the model takes TRL's own keyword arguments, and no leaf gets a copy of its prefix.

`TreeRow` of TRL 1.16 (`trl.experimental.async_grpo.packing`) folds samples into a trie; its attention, "tree_fa3", gathers the
keys of each leaf's whole path for FlashAttention-3. With `attn_implementation="trainkit"` the same arguments are read as a tree.

    python examples/trl_tree.py
"""

import importlib.util
from itertools import pairwise

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainkit.kernels import register_transformers

torch.manual_seed(0)
prompt, fork = torch.randint(128, (20,)), torch.randint(128, (6,))
answers = [torch.cat([prompt, fork, torch.randint(128, (4,))]), torch.cat([prompt, fork, torch.randint(128, (8,))]),
           torch.cat([prompt, torch.randint(128, (5,))])]  # fmt: skip

if importlib.util.find_spec("trl") is not None:
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    for ids in answers:
        row.add({
            "input_ids": ids, "completion_mask": torch.arange(len(ids)) >= 20, "old_log_probs": torch.zeros(len(ids)),
            "advantage": 1.0, "group_id": 0,
        })  # fmt: skip
    packed = row.pack()
else:
    # What TRL makes of them, written out: prompt without its last token; that token with the fork up to where the two part;
    # and three ends.
    parts = [answers[0][:19], answers[0][19:25], answers[0][25:], answers[1][25:], answers[2][19:]]
    bounds = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0)
    rows = [torch.arange(int(a), int(b)) for a, b in pairwise(bounds)]
    paths = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4]]
    keys = [torch.cat([rows[i] for i in path]) for path in paths]
    starts = [0, 19, 25, 25, 19]
    packed = {
        "input_ids": torch.cat(parts),
        "position_ids": torch.cat([s + torch.arange(len(p)) for s, p in zip(starts, parts, strict=True)]),
        "tree_kv_index": torch.cat(keys),
        "tree_cu_seqlens_q": bounds.int(),
        "tree_cu_seqlens_k": torch.tensor([0, *(len(k) for k in keys)]).cumsum(0).int(),
    }

config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attn_implementation=register_transformers(),
)  # fmt: skip
model = LlamaForCausalLM(config)
tree = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
with torch.no_grad():
    logits = model(
        packed["input_ids"][None], position_ids=packed["position_ids"][None], use_cache=False, **tree
    ).logits[0]
    # The end of the second answer, against the answer alone.
    path = packed["tree_kv_index"][packed["tree_cu_seqlens_k"][3] : packed["tree_cu_seqlens_k"][4]]
    alone = model(packed["input_ids"][path][None], use_cache=False).logits[0]
worst = float((logits[path] - alone).abs().max())
print(f"tokens computed: {len(packed['input_ids'])} instead of {sum(map(len, answers))}")
print(f"keys gathered by TRL's own attention: {len(packed['tree_kv_index'])} a layer; by this one: none")
print(f"largest difference of a logit: {'below 1e-5' if worst < 1e-5 else worst}")
