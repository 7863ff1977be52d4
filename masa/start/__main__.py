"""``python -m masa.start``, which is what ``masa`` is."""

import sys

from masa.start import main

sys.exit(main())
