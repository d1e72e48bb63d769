"""What is where while training: recompute boundaries, layers that wait elsewhere, layer inputs, tiles, the two ends."""
