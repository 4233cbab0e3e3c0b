"""Two things that torchrun leaves open: ranks that restart, and a rank that hangs."""

import os
import sys
import threading
import time
import uuid

LOOK_EVERY = 10.0  # seconds between two looks of the watchdog, at most
FIRST_LOOK_AT_OTHERS = 0.5  # of the time limit: from then on a waiting rank reads the others' marks
SILENT_AFTER = 1 / 3  # of the time limit: a rank whose mark is older than that does not run


def agree_on_restart_id(store, rank, size):
    """Agree on a fresh key prefix for this attempt, and return it.

    torchrun keeps one key-value store for all attempts: when it restarts the ranks, the store still
    holds what the dead ones wrote, their network addresses among it. So each rank writes a word
    that nobody wrote before, rank 0 answers each of them with its own word, and all use that. Rank
    0 repeats its answers until everybody has taken one, since it may have answered a word that a
    dead rank left behind."""
    own_word = uuid.uuid4().hex
    store.set(f"hello_{rank}", own_word)
    if rank > 0:
        agreed = store.get(own_word).decode()  # waits until rank 0 has set it
        store.add(agreed, 1)
        return agreed
    while store.add(own_word, 0) < size - 1:
        for other in range(1, size):
            store.set(store.get(f"hello_{other}").decode(), own_word)
        time.sleep(0.05)
    return own_word


def start_hang_watchdog(store, rank, size, collectives, minutes, is_running):
    """Start a thread that ends this process when another rank hangs, and says which one.

    1. Every rank keeps a mark in the store: how many collectives it has begun, and the time.
    2. A rank that has begun none for half of the limit starts to read the others' marks.
    3. A rank is late when it has begun fewer collectives, or when its mark stands still.
    4. After the whole limit, a rank that waits for a late one prints so and ends its process.
    5. torchrun then ends the others, or starts all of them again.

    collectives   an object whose .count grows with every collective of this rank
    minutes       the time limit
    is_running()  whether the process group still exists"""
    limit = 60 * minutes
    pause = min(LOOK_EVERY, limit / 10)

    def watch():
        count_seen = -1
        count_since = last_look = 0.0
        marks = {}  # rank -> (its mark, when we first read that mark)
        while is_running():
            now = time.monotonic()
            was_suspended = now - last_look > 6 * pause
            if collectives.count != count_seen or was_suspended:
                count_seen, count_since, marks = collectives.count, now, {}
            last_look = now
            store.set(f"mark_{rank}", f"{count_seen} {now}")
            waited = now - count_since
            if waited > FIRST_LOOK_AT_OTHERS * limit:
                for other in range(size):
                    mark = store.get(f"mark_{other}")
                    if other not in marks or marks[other][0] != mark:
                        marks[other] = mark, now
            late = []
            for other, (mark, first_read) in marks.items():
                has_begun_fewer = int(mark.split()[0]) < count_seen
                stands_still = now - first_read > SILENT_AFTER * limit
                if has_begun_fewer or stands_still:
                    late.append(other)
            if waited > limit and late and rank not in late:
                names = ", ".join(map(str, late))
                print(
                    f"error: rank {rank} has waited {minutes:g} minutes (NANOSAFE_TIMEOUT) for "
                    f"rank {names}, which hangs",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            time.sleep(pause)

    threading.Thread(target=watch, daemon=True).start()
