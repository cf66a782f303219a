"""What clients speak: this server's own jobs, OpenAI's images, AUTOMATIC1111's web UI."""
