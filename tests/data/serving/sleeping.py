"""Models that sleep like a GPU, and misbehave on request."""

import os
import time


def squares(device):
    """l(b) = 20 + 2 b ms; some inputs misbehave."""

    def predict(inputs):
        time.sleep(0.020 + 0.002 * len(inputs))
        if "long" in inputs:
            time.sleep(2)
        if "die" in inputs:
            os._exit(1)
        if "nan" in inputs:
            return [float("nan") for _ in inputs]
        return [x if x == "long" else x * x for x in inputs]

    return predict


def broken(device):
    raise OSError("weights are missing")
