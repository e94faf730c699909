"""The oracles: worker and switch in plain Python, without a socket or a clock.

The native worker and switch are held to them packet by packet; nothing in the product runs them.
"""

from trainkit.switchml.reference._switch import Aggregation as Aggregation
from trainkit.switchml.reference._switch import Switch as Switch
from trainkit.switchml.reference._worker import Worker as Worker
