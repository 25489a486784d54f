"""Ids: a prefix that names the kind and 26 characters that sort by time of creation.

The characters are a ULID (48 bits of milliseconds, 80 random bits, Crockford's base 32), in lower
case. Ids of one process are strictly increasing even within a millisecond.
"""

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 26
_RANDOM_BITS = 80

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """A fresh id such as `job_01k9…`; later ones compare greater."""
    global _last
    with _lock:
        fresh = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        # Within the same millisecond, or after the clock was set back, count on from the last one.
        same_millisecond = fresh >> _RANDOM_BITS <= _last >> _RANDOM_BITS
        _last = _last + 1 + secrets.randbits(32) if same_millisecond else fresh
        value = _last
    digits = [_ALPHABET[(value >> (5 * place)) & 31] for place in reversed(range(_LENGTH))]
    return f"{prefix}_{''.join(digits)}"
