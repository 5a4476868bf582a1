"""A neighbour: grows to a size at a rate, touches all of its memory over and over, then ends with 0.

Usage: hog.py MIB MIB_PER_S HOLD_S
"""

from __future__ import annotations

import ctypes
import sys
import time

MIB = 1 << 20
STEP_MIB = 2


def main(mib: int, mib_per_s: float, hold_s: float) -> None:
    blocks = []
    started = time.monotonic()
    for grown in range(0, mib, STEP_MIB):
        block = ctypes.create_string_buffer(STEP_MIB * MIB)
        ctypes.memset(block, 1, STEP_MIB * MIB)
        blocks.append(block)
        time.sleep(max(0.0, started + (grown + STEP_MIB) / mib_per_s - time.monotonic()))
    print(f"hog holds {mib} MiB after {time.monotonic() - started:.2f} s", flush=True)
    ends = time.monotonic() + hold_s
    slowest = 0.0
    while time.monotonic() < ends:
        for block in blocks:
            began = time.monotonic()
            ctypes.memset(block, 2, STEP_MIB * MIB)
            slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.2)
    print(f"hog done, slowest touch {slowest * 1000:.1f} ms", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
