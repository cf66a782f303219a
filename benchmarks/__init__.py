"""How fast sampling is, and beside PyTorch; what was measured is in RESULTS.md."""
