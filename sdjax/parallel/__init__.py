"""Floor 1: the device mesh, and which part of every array lives where on it."""
