"""Generation by continuous batching over paged keys and values."""

from trainkit.serving.generate._engine import Engine as Engine
from trainkit.serving.generate._generate import generate as generate
from trainkit.serving.generate._sampling import Sampling as Sampling
from trainkit.serving.generate._sampling import Token as Token
