"""The public names of this room, for type checkers; ``__init__.py`` imports each when it is first used."""

from qlora.evaluation.tasks.opening import open_task as open_task
from qlora.evaluation.tasks.presets import kind_of as kind_of
from qlora.evaluation.tasks.result import Metric as Metric
from qlora.evaluation.tasks.result import Paired as Paired
from qlora.evaluation.tasks.result import Result as Result
from qlora.evaluation.tasks.result import difference as difference
from qlora.evaluation.tasks.scoring import score as score
from qlora.evaluation.tasks.table import lines as lines
from qlora.evaluation.tasks.table import table as table
from qlora.evaluation.tasks.task import Task as Task
