"""`python -m kdejsd` is the command `kdejsd`."""

import sys

from .cli import main

sys.exit(main())
