"""
Splits the command line of a script into words and flags.
"""
from run.errors import UserError


def words_and_flags(argv, switches=()):
    """
    The words of a command line, and {name: value} of its flags --name=value. switches: names of
    flags that have no value, beside help. Raises UserError for another flag without a value.
    """
    words, flags = [], {}
    for arg in argv:
        name, has_value, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            words.append(arg)
        elif has_value or name in ('help', *switches):
            flags[name] = value
        else:
            raise UserError(f"--{name} has no value: write --{name}=VALUE.")
    return words, flags
