"""Schedules: the one form, its replay, its clock, its files."""

from trainkit.collectives.schedule._compose import compose as compose
from trainkit.collectives.schedule._form import Schedule as Schedule
from trainkit.collectives.schedule._op import Op as Op
from trainkit.collectives.schedule._op import ScheduleError as ScheduleError
from trainkit.collectives.schedule._store import from_dict as from_dict
from trainkit.collectives.schedule._store import to_dict as to_dict
from trainkit.collectives.schedule._time import link_loads as link_loads
from trainkit.collectives.schedule._units import bytes_per_second as bytes_per_second
