"""trainkit.collectives"""
