"""What a person can mend: one line on stderr instead of a traceback."""


class BenchError(Exception):
    """Input that cannot be used; the message names it and the remedy."""


class BrokenDeviceError(BenchError):
    """A provider left the device unusable for this process."""
