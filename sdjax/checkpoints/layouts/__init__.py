"""Layouts of a checkpoint: diffusers' folders, and single files of the original naming."""
