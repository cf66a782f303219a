"""Floor 2: foreign weights and their configs as declarative tables, read and written."""
