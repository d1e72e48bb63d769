"""What a run will take, known before it starts: bytes, seconds, and other ways to arrange it."""
