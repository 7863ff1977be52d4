"""One pass over text: what goes into every matrix, and what the loss says of it."""
