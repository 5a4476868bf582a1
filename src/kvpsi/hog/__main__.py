"""The process of one neighbour; see `kvpsi.hog.worker`."""

import sys

from kvpsi.hog.worker import main

main(sys.argv[1])
