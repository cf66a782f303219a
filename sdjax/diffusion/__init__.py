"""Floor 1: the mathematics of diffusion. It knows noise levels and a callable `denoise`, never a network."""
