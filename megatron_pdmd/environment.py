"""Environment variables that say which rank of how many a process is, and where the ranks meet."""

import os

from megatron_pdmd.limits import shown

MOST_RANKS = 2**20
MOST_PORTS = 2**16


def whole_number(name: str, default: int, least: int, most: int) -> int:
    """The value of an environment variable.

    Args:
        name: the variable.
        default: its value where it is not set, or empty.
        least, most: the values that it may have.

    Raises:
        ValueError: names the variable, its value and what it may be.
    """
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(f"{name}={shown(text)}: this environment variable must be a whole number in [{least}, {most}]")
    return int(text)


def check_rank_variables() -> None:
    """Refuses variables that cannot describe a rank; the launcher sets them, or the batch system.

    Raises:
        ValueError: names the variable.
    """
    world = whole_number("WORLD_SIZE", 1, 1, MOST_RANKS)
    whole_number("RANK", 0, 0, world - 1)
    local_world = whole_number("LOCAL_WORLD_SIZE", world, 1, world)
    whole_number("LOCAL_RANK", 0, 0, local_world - 1)
    whole_number("MASTER_PORT", 29500, 1, MOST_PORTS - 1)
