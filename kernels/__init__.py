"""Fused kernels for training: attention in every variant, and what else a step spends its time in.

Imports torch; Triton only when a kernel is first used.

Notation, here and in the kernels:

- B batch entries (or packed sequences, requests), S tokens (Sq queries, Sk keys), Hq and Hkv heads, GROUP = Hq / Hkv,
  D head dimension of q and k, Dv of v. Tensors are `[B, S, H, D]`.
- BM queries by BN keys: a tile's (or block's) sides; a full block is seen wholly, a partial one in part, an empty one not.
- s scores, p = exp(s - m) weights, m a row's maximum so far, l its sum of weights, alpha what rescales old sums under a new
  maximum; lse = m + log(l), natural where it leaves a kernel, base 2 within.
- off = Sk - Sq: query i stands at key i + off. w: the window. delta = rowsum(out * dout) - dlse.
"""

from trainkit.kernels._attention._dispatch import Explanation as Explanation
from trainkit.kernels._attention._dispatch import attention as attention
from trainkit.kernels._attention._trace import Untraceable as Untraceable
from trainkit.kernels._patch import Patched as Patched
from trainkit.kernels._patch import patch as patch
from trainkit.kernels._torch_attention import register_torch as register_torch
from trainkit.kernels._transformers import register_transformers as register_transformers
from trainkit.kernels.fused._loss import linear_cross_entropy as linear_cross_entropy
from trainkit.kernels.fused._rms_norm import rms_norm as rms_norm
from trainkit.kernels.fused._rope import rope as rope
from trainkit.kernels.fused._sample import sample as sample
from trainkit.kernels.fused._swiglu import swiglu as swiglu
from trainkit.kernels.lowbit._compressed_tensors import export_compressed_tensors as export_compressed_tensors
from trainkit.kernels.lowbit._configs import W4A4 as W4A4
from trainkit.kernels.lowbit._configs import W4A8 as W4A8
from trainkit.kernels.lowbit._configs import W4A16 as W4A16
from trainkit.kernels.lowbit._configs import W8A8 as W8A8
from trainkit.kernels.lowbit._files import load_quantized as load_quantized
from trainkit.kernels.lowbit._files import save_quantized as save_quantized
from trainkit.kernels.lowbit._linear import LowBitLinear as LowBitLinear
from trainkit.kernels.lowbit._qat import prepare_qat_ as prepare_qat_
from trainkit.kernels.lowbit._quantize import quantize_ as quantize_
from trainkit.kernels.lowbit._report import Report as Report
from trainkit.kernels.paged._append import append_kv as append_kv
from trainkit.kernels.paged._attention import Maximum as Maximum
from trainkit.kernels.paged._attention import PagedAttention as PagedAttention
from trainkit.kernels.paged._merge import merge_states as merge_states
from trainkit.kernels.paged._packing import pack_samples as pack_samples
from trainkit.kernels.paged._tree import tree_attention as tree_attention
