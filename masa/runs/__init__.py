"""A run's directory: files that are whole, locks, faults, memory, devices, progress, and the fingerprint of code."""
