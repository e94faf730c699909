"""Accelerate, and what is built on it: the backend "trainkit" by its name, on CPUs too."""

from trainkit.integrations.accelerate._backend import register_backend as register_backend
