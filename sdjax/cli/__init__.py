"""Floor 6: the command line's own: jobs, prompt files, grids, and the settings inside images."""
