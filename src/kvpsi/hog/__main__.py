"""The process of one neighbour; see `kvpsi.hog.worker`."""

import contextlib
import sys

from kvpsi.hog.worker import main

with contextlib.suppress(BrokenPipeError):  # whoever started it is gone
    main(sys.argv[1])
