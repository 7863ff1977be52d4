"""The mechanism: the matrices of a projection, over all layers, come from one shared source."""
