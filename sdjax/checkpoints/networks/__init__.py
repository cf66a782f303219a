"""A file a network: its table of keys and its config, both directions."""
