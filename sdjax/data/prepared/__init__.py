"""Latents and text embeddings, computed once."""
