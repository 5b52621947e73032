"""The one base of errors that a person can mend; the command line prints them without traceback."""


class UserError(Exception):
    """Something about a config, a file or a model that its message explains, with the remedy."""
