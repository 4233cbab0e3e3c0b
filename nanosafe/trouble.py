"""What ends a run and is no mistake in its code, in one line: memory, the disk, another rank."""

import errno
import os
import re
import sys
import threading
import time
import traceback

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
SAMPLING = {"slots": "fewer, 64 say", "max_new_tokens": "fewer", "offload": "frozen, or all"}
TRAINING = {"max_tokens": "fewer", "activation_checkpointing": "True", "offload": "frozen, or all"}

def explain(error, knobs):
    """A sentence about an exception that is no mistake in the code, or None."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "allocate memory" in text:
        sampling = "rollout.py" in "".join(traceback.format_tb(error.__traceback__))
        where, turns = ("sampling", SAMPLING) if sampling else ("a forward or backward", TRAINING)
        turn = [f"{name}={knobs[name]!r} ({to})" for name, to in turns.items() if name in knobs]
        return f"out of memory in {where}: {', '.join(turn) or 'take fewer'}. {text}"
    if isinstance(error, ConnectionError) or re.search("(closed|reset) by peer|Timed out", text):
        return f"another rank ended, and this one with it ({text[:80]})"
    if getattr(error, "errno", None) in DISK:
        return f"{text}; mend this, and a run goes on from its last state with --resume=True"

def watch(store, rank, size, calls, minutes, lasts):
    """Start a thread that ends this process when it has waited `minutes` for another rank, and says
    which: one with fewer `calls` [of collectives] in the store, or whose clock there stands."""
    def look():
        met, since = -1, 0.0
        while lasts():
            now = time.time()
            met, since = (met, since) if calls[0] == met else (calls[0], now)
            store.set(f"met_{rank}", f"{met} {now}")
            if now - since > 60 * minutes:
                told = [store.get(f"met_{r}").split() for r in range(size)]
                late = [str(r) for r, (n, at) in enumerate(told)
                        if int(n) < met or now - float(at) > 30 * minutes]
                if late and str(rank) not in late:
                    print(f"error: rank {rank} has waited {minutes:g} minutes for rank "
                          f"{', '.join(late)}, which hangs; resume from the last state (or let "
                          "NANOSAFE_TIMEOUT be more minutes)", file=sys.stderr, flush=True)
                    os._exit(1)
            time.sleep(min(10, 6 * minutes))

    threading.Thread(target=look, daemon=True).start()
