"""A web page and APIs over one engine that owns the devices."""
