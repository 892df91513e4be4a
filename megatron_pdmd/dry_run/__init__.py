"""A run rehearsed for GPUs that are not there."""
