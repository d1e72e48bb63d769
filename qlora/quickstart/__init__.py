"""What a first run needs and nothing else in qlora knows: a small model, data for it, and their recipe.

``python -m qlora.quickstart`` puts them in place and says what to do next.
"""

__all__: list[str] = []
