"""The methods, a file each, and the algebra that they have in common."""
