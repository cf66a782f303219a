"""Floor 2: what every training run shares, whatever it trains."""
