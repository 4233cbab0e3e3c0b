"""Rows in the layouts of other projects -> nanosafe's rows."""


def to_raw_sample(record):
    return record
