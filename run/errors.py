"""
The error that most of the repository raises for a user's mistake.
"""


class ModelError(Exception):
    """ A sentence for the user: what was wrong, where, and what to do. """
