"""Handing a trained model over: merged with its base into one plain checkpoint or GGUF file, or its adapter alone."""
