"""First stages: the objective of LDM's autoencoders, and the critics that judge reconstructions."""
