"""Pipeline parallelism: one iteration of all roles as one graph of passes, scheduled as a whole."""
