"""A phase's iterations where pipeline stages share the layers of its networks."""
