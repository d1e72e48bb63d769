"""A short visit to a card: what only a card can tell, in order of value. ``python -m benchmarks.on_gpu``, see __main__.py."""
