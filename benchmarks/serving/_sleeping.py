"""ResNet50's profile, slowed: a GPU that sleeps."""

import os
import time

SLOWED = float(os.environ.get("SLOWED", "20"))


def load(device):
    """A model for `trainkit serve`."""

    def predict(inputs):
        time.sleep((5.072 + 1.053 * len(inputs)) * SLOWED / 1e3)
        return [value * value for value in inputs]

    return predict
