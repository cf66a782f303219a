"""Floor 5: how good a model is, in figures that can be had again with the same command."""
