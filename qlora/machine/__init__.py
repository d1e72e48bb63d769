"""The machine: which device and dtype, its memory and disk, and cards that are not here."""
