"""How many GPUs a pool needs from minute to minute, and which models share which sub-cluster: pure, no clock."""

from trainkit.serving.autoscaling._allocation import Allocation as Allocation
from trainkit.serving.autoscaling._allocation import AllocationError as AllocationError
from trainkit.serving.autoscaling._allocation import Cluster as Cluster
from trainkit.serving.autoscaling._allocation import allocate as allocate
from trainkit.serving.autoscaling._autoscaler import Autoscaler as Autoscaler
from trainkit.serving.autoscaling._simulated import Scaled as Scaled
from trainkit.serving.autoscaling._simulated import simulate_allocated as simulate_allocated
from trainkit.serving.autoscaling._simulated import simulate_autoscaled as simulate_autoscaled
