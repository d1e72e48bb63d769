"""A study: many runs that differ in what is asked about, compared fairly, told on one page.

spec (what is asked) ─► schedule (which cell next) ─► engines ─► cell (one run, measured) ─► results ─► page
                                                 run (all of it)
"""

from __future__ import annotations

from qlora.studies.results import Compared, Row
from qlora.studies.run import Study, plan_study, study
from qlora.studies.spec import StudySection

__all__ = ["Compared", "Row", "Study", "StudySection", "plan_study", "study"]
