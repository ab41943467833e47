"""The one exception for what a person can fix."""


class UserError(Exception):
    """What was wrong, the value, the remedy: one line, shown without a traceback, exit status 2."""
