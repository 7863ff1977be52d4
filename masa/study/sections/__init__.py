"""The sections of the configuration, a class each: a key has its type, range, default and sentence here alone."""
