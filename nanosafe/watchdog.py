"""What ends a run and is no mistake in its code, in one line: memory, the disk, another rank."""

import os
import sys
import threading
import time
import uuid


def agree_on_restart_id(store, rank, size):
    """A word that this attempt's ranks share: torchrun restarts them on a store that still holds
    what dead ones wrote, their addresses too. Each says a new word; rank 0 answers with its own."""
    word = uuid.uuid4().hex
    store.set(f"hello_{rank}", word)
    if rank > 0:
        word = store.get(word).decode()  # it waits
        store.add(word, 1)
    while rank == 0 and store.add(word, 0) < size - 1:  # a hello may have been a dead rank's
        for r in range(1, size):
            store.set(store.get(f"hello_{r}").decode(), word)
        time.sleep(0.05)
    return word


def start_hang_watchdog(store, rank, size, calls, minutes, lasts):
    """Start a thread that ends this process when it has waited `minutes` for another rank, and says
    which: one with fewer `calls` [of collectives] in the store, or whose clock there stands."""

    def look():
        pause, met, since, looked, told = min(10, 6 * minutes), -1, 0.0, 0.0, {}
        while lasts():
            now = time.monotonic()
            if calls[0] != met or now - looked > 6 * pause:  # it moves, or all were suspended
                met, since, told = calls[0], now, {}
            looked = now
            store.set(f"met_{rank}", f"{met} {now}")
            if now - since > 30 * minutes:
                for r in range(size):
                    said = store.get(f"met_{r}")
                    told[r] = (said, now) if told.get(r, ("",))[0] != said else told[r]
            late = [
                str(r)
                for r, (said, at) in told.items()
                if int(said.split()[0]) < met or now - at > 20 * minutes
            ]
            if now - since > 60 * minutes and late and str(rank) not in late:
                print(
                    f"error: rank {rank} has waited {minutes:g} minutes (NANOSAFE_TIMEOUT) for "
                    f"rank {', '.join(late)}, which hangs",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            time.sleep(pause)

    threading.Thread(target=look, daemon=True).start()
