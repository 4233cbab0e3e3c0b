"""TODO."""

from nanosafe import parallel


def format_table(rows):
    """Lines of a table: rows of cells, the first row being the head."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(str(x).ljust(width) for x, width in zip(row, widths)) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def print_once(text):
    if parallel.rank() == 0:
        print(text, flush=True)
