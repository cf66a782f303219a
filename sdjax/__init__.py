"""sdjax: latent diffusion in JAX and Flax, from training on a pod to a picture on a laptop."""
