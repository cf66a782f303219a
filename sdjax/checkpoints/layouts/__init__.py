"""Where a checkpoint's networks stand: diffusers' folders, and single files of the original naming."""
