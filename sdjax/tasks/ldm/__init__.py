"""Latent diffusion with any of the paper's conditions (LDM, section 3.3 and 4): what all of those tasks share.

A task is a file of `sdjax.tasks` that says what its model is told (a `Conditioner`) and how that is made from data.
"""
