"""The error that a user can mend."""


class UserError(Exception):
    """Wrong usage, configuration or input. Commands print it as one line, `error: …`, and exit with 2."""


class ReadError(Exception):
    """A file cannot be read. The reason is for people to read and holds no value of any header."""
