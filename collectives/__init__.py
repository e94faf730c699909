"""Collectives that follow the network: exact bounds, spanning-tree forests, one form of schedule."""

from trainkit.collectives.schedule import Op as Op
from trainkit.collectives.schedule import Schedule as Schedule
from trainkit.collectives.schedule import ScheduleError as ScheduleError
