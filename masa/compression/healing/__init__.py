"""Short fine-tunes of what was compressed."""
