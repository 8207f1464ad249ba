"""
The error that most of the repository raises for a user's mistake, and how it tells other errors.
"""


class ModelError(Exception):
    """ A sentence for the user: what was wrong, where, and what to do. """


def first_line(error):
    """ The first line of an error's message, or its type if it has none; 160 characters at most. """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
