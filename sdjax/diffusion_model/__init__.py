"""Floor 3: one type for every diffusion model, one jitted sampling root, one file a conditioner."""
