"""The scheduler's core: pure, in integer nanoseconds, without a clock; knows neither torch nor a server."""

from trainkit.serving.scheduler._actions import Action as Action
from trainkit.serving.scheduler._actions import Dispatch as Dispatch
from trainkit.serving.scheduler._actions import Drop as Drop
from trainkit.serving.scheduler._profile import Profile as Profile
from trainkit.serving.scheduler._profile import ProfileError as ProfileError
from trainkit.serving.scheduler._rules import SchedulerError as SchedulerError
from trainkit.serving.scheduler._scheduler import Scheduler as Scheduler
