"""The one base of errors that a person can mend; the command line prints them without traceback."""


class UserError(Exception):
    """Something about a config, a file or a model that its message explains, with the remedy."""


class Terminated(Exception):
    """The run was told to end (SIGTERM) and has saved what it had; the same command resumes."""
