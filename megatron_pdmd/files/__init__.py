"""Files in and out: a user's are read within limits, ours are written whole."""
