"""``python -m kvpsi`` is the ``kvpsi`` command."""

import sys

from kvpsi.cli.main import main

sys.exit(main())
