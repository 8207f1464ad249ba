"""
The errors that the repository raises for a user's mistake, and how it tells other errors.
"""
import re

# a control character other than a tab and a line's end
CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')


def escaped(text):
    """ A text with its control characters as escapes such as \\x1b. """
    return CONTROL.sub(lambda c: ascii(c[0])[1:-1], text)


class UserError(Exception):
    """
    A sentence for the user: what was wrong, where, and what to do. A text in it may come from a
    received file, so control characters, which could steer a terminal, are printed as \\x1b.
    """
    def __str__(self):
        return escaped(super().__str__())


class ModelError(UserError):
    """ An error in a run, its folder, its LM or its knobs. """


def first_line(error):
    """ The first line of an error's message, or its type if it has none; 160 characters at most. """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
