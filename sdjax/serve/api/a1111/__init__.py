"""The API of AUTOMATIC1111/stable-diffusion-webui, for the clients that speak it."""
