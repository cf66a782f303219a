"""Floor 1: datasets, tokenizers and the loader; they give NumPy arrays and know no model."""
