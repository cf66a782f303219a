"""APIs over the engine: this server's own jobs, OpenAI's images, AUTOMATIC1111's web UI."""
