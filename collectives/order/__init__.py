"""Rank order: which host should get which rank, and how a job is told."""

from trainkit.collectives.order._check import OrderError as OrderError
from trainkit.collectives.order._cost import order_cost as order_cost
from trainkit.collectives.order._group import ordered_group as ordered_group
from trainkit.collectives.order._launchers import LAUNCHERS as LAUNCHERS
from trainkit.collectives.order._launchers import launcher_text as launcher_text
from trainkit.collectives.order._network import hosts_of as hosts_of
from trainkit.collectives.order._network import network_costs as network_costs
from trainkit.collectives.order._network import racks as racks
from trainkit.collectives.order._network import ring_load as ring_load
from trainkit.collectives.order._order import Ordering as Ordering
from trainkit.collectives.order._order import order_ranks as order_ranks
from trainkit.collectives.order._plan import Arrival as Arrival
from trainkit.collectives.order._plan import RankPlan as RankPlan
