"""The main job of memodb on real input: ``python -m demo``, or ``make demo``."""
