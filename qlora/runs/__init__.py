"""The run folder and its verbs: train, resume, evaluate, export."""
