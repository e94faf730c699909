"""Rank order: which host should get which rank, and how a job is told."""

from trainkit.collectives.order._check import OrderError as OrderError
from trainkit.collectives.order._cost import order_cost as order_cost
from trainkit.collectives.order._order import Ordering as Ordering
from trainkit.collectives.order._order import order_ranks as order_ranks
