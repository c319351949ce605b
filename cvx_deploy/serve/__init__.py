"""A service: OpenAI's video API over a durable queue, with a worker process a device that runs the Python API."""
