"""What no scheduler, or none of a kind, can exceed."""

from trainkit.serving.bounds._bounds import fluid as fluid
from trainkit.serving.bounds._bounds import staggered as staggered
from trainkit.serving.bounds._bounds import uncoordinated as uncoordinated
