"""Generation: what an engine is asked for, and what it answers."""

from trainkit.serving.generate._requests import Sampling as Sampling
from trainkit.serving.generate._requests import Token as Token
