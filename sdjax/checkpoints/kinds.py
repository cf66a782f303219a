"""Kinds of checkpoints."""

STABLE_DIFFUSION, LDM, PIXELS = "stable_diffusion", "ldm", "pixels"
"""The kinds of checkpoints: Stable Diffusion's family, the LDM paper's other models, models of pixels."""
CAPTIONS = "text_t5"
"""The conditioning on prompts that T5 reads."""
