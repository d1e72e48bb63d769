"""The machine: which device and dtype, its memory and disk, and cards that are not here."""

DISTRIBUTION = "qlora-trainer"
"""What pip and importlib.metadata call this package; ``qlora`` is another project's name there."""
