"""vLLM for the trainer: rollouts of the student and scores of a teacher.

Nothing here imports vLLM before an engine is started, and what speaks HTTP never does: the server
may run in an environment of its own.
"""
