"""``python -m memodb.cli``, where the ``memodb`` script is not on the path."""

import sys

from memodb.cli import main

sys.exit(main())
