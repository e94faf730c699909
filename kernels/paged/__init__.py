"""Attention over keys in pages, in trees and in levels, with gradients (FlashInfer, arXiv 2501.01005)."""
