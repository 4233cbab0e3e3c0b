"""How nanosafe prints: once for all ranks, past progress bars, and numbers in tables."""

import sys
from functools import cache

from tqdm import tqdm

from nanosafe.parallel import rank


def print_once(text, file=None):
    """Print a line on rank 0, above a progress bar if there is one. file: stdout by default."""
    if rank() == 0:
        file = file or sys.stdout
        tqdm.write(text, file=file)
        file.flush()


@cache
def say_once(text):
    """print_once() of a text, the first time that it is given."""
    print_once(text)


def format_table(rows):
    """Lines of a table from rows of cells, the first of which are the heads."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
