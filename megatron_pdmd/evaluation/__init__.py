"""Diversity, motion and fidelity of samples, pictures of them, and the report of a run."""
