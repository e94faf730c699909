"""The main job: a byte-level GPT trained with AutoLRS, SwitchML and the fused attention at once."""

from trainkit._processes import WorkerFailed as WorkerFailed
from trainkit.demo._config import ARMS as ARMS
from trainkit.demo._config import SIZES as SIZES
from trainkit.demo._config import Config as Config
from trainkit.demo._run import prepare as prepare
from trainkit.demo._run import run as run
