"""Evaluation: the loss on held-out data, answers to prompts, and what became of the weights. Leaves the model as it was."""
