"""A study: many runs that differ in what is asked about, compared fairly, told on one page.

spec (what is asked) ─► schedule (which cell next) ─► engines ─► cell (one run, measured) ─► results ─► page
                                                 run (all of it)
"""
