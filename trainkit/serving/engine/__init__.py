"""The server: LitServe in front, the scheduler in its one worker, a process for each GPU behind it."""

from trainkit.serving.engine._measure import measure as measure
from trainkit.serving.engine._models import InputError as InputError
from trainkit.serving.engine._models import LanguageModel as LanguageModel
from trainkit.serving.engine._models import ModelError as ModelError
from trainkit.serving.engine._models import ModelSource as ModelSource
from trainkit.serving.engine._options import Language as Language
from trainkit.serving.engine._options import Objective as Objective
from trainkit.serving.engine._options import ServeError as ServeError
from trainkit.serving.engine._options import ServeOptions as ServeOptions
from trainkit.serving.engine._server import serve as serve
