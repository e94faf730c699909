"""trainkit.switchml"""
