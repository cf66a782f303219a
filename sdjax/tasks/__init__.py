"""Floor 3: one file a system: what conditions what, and its loss."""
