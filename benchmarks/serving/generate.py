"""Generation: ours on the demo's GPT and on transformers' Llama of the same shape, against transformers' own ways.

    python benchmarks/serving/generate.py --requests 256 --tokens 64

bf16, random weights, prompts of 16 to 256 random tokens, greedy, no stop token; tokens drawn a second, one run after one of
warm-up. `plain` is `model.generate` on one left-padded batch, `continuous` transformers' continuous batching, both with SDPA.
Whether ours draws what `plain` draws is counted in fp32 on the first requests.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trainkit.demo._config import SIZES
from trainkit.demo._model import GPT
from trainkit.serving.generate import Sampling, generate

GREEDY = Sampling(temperature=0)


def timed(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def plain(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Transformers' `generate` of one padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return out[:, longest:].tolist()  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--arms", nargs="+", default=["gpt", "gpt graphs", "llama", "plain", "continuous"])
    options = parser.parse_args()
    size = SIZES["30m"]
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 257, (options.requests,), generator=g).tolist()
    prompts = [torch.randint(1, 256, (n,), generator=g).tolist() for n in lengths]
    config = LlamaConfig(
        vocab_size=256, hidden_size=size.width, intermediate_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=size.context,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    gpt = GPT(size, 256, 1e-3).to("cuda", torch.bfloat16).eval()
    batch = {
        "max_batch": options.requests,
        "max_step_tokens": 8192,
        "sampling": GREEDY,
        "max_new_tokens": options.tokens,
    }

    def continuous() -> None:
        llama.set_attn_implementation("sdpa")
        said = GenerationConfig(max_new_tokens=options.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        llama.generate_batch(inputs=prompts, generation_config=said, progress_bar=False)

    def padded() -> None:
        llama.set_attn_implementation("sdpa")
        plain(llama, prompts, options.tokens)

    arms: dict[str, Callable[[], Any]] = {
        "gpt": lambda: generate(gpt, prompts, **batch),
        "gpt graphs": lambda: generate(gpt, prompts, cuda_graphs=True, **batch),
        "llama": lambda: generate(llama, prompts, **batch),
        "plain": padded,
        "continuous": continuous,
    }
    drawn = options.requests * options.tokens
    for name in options.arms:
        try:
            print(json.dumps({"arm": name, "tokens/s": round(drawn / timed(arms[name]))}), flush=True)
        except Exception as error:
            print(json.dumps({"arm": name, "error": repr(error)[:200]}), flush=True)
    exact = LlamaForCausalLM(config).to("cuda").eval()
    few = prompts[:16]
    want = plain(exact, few, 32)
    got = generate(exact, few, max_new_tokens=32, sampling=GREEDY)
    print(json.dumps({"equal requests of 16, fp32": sum(a == b for a, b in zip(want, got, strict=True))}))


if __name__ == "__main__":
    main()
