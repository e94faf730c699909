"""Fused kernels for training: attention in every variant, and what else a step spends its time in.

Imports torch; Triton only when a kernel is first used.
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
from trainkit.kernels.fused._swiglu import swiglu as swiglu
