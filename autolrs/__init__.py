"""trainkit.autolrs"""
