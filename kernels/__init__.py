"""Fused kernels for training: attention in every variant. Imports torch; Triton only when a kernel is first used."""

from trainkit.kernels._attention._dispatch import Explanation as Explanation
from trainkit.kernels._attention._dispatch import attention as attention
