"""Names in a run's workdir that more than training must know."""

EXPORT = "export"
"""The folder with the finished model, which `sdjax.load` reads."""
