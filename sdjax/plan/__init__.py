"""Floor 5: what a program would need and take on devices that are not there, from compiling it alone."""
