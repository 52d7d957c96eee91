from __future__ import annotations

import sys

from moetrain.cli import main

sys.exit(main())
