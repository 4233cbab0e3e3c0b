"""
Rows of cells, aligned for a terminal.
"""


def table(rows):
    """Lines of a table: rows of cells, the first row being the head."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).ljust(width)
                               for cell, width in zip(row, widths)).rstrip()
                     for row in rows)
