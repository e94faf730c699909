"""trainkit.kernels"""
