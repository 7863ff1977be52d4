"""Where every run stands, read from its files alone: by another process, and on another machine of a shared disk."""
