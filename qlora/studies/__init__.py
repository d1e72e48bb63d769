"""A study: many runs that differ in what is asked about, compared fairly, told on one page.

spec (what is asked) ─► schedule (which cell next) ─► engines ─► cell (one run, measured) ─► results ─► page
                                                 run (all of it)
"""

from __future__ import annotations

from qlora.files.late import late_names

__getattr__, __all__ = late_names(__file__)
