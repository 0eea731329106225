"""Let the test files here import tiny_models.py; nothing here needs torch, which may not be installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
