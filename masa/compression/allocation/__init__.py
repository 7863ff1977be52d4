"""Which layers go together, and how many numbers each matrix may keep."""
