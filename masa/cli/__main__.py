"""``python -m masa.cli``."""

import sys

from masa.cli.main import main

sys.exit(main())
