"""A run's folder: whose it is, who is at work in it, and that nothing in it is lost."""
