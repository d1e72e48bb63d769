"""Faults injected for real, and what survives them: ``make survive``."""
