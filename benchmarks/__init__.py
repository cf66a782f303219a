"""Speed of sampling, and of PyTorch's beside it; RESULTS.md has the measurements."""
