"""The public names of this room, for type checkers; ``__init__.py`` imports each when it is first used."""

from qlora.studies.results import Compared as Compared
from qlora.studies.results import Row as Row
from qlora.studies.run import Study as Study
from qlora.studies.run import plan_study as plan_study
from qlora.studies.run import study as study
from qlora.studies.spec import StudySection as StudySection
