"""AdamW, its states over the ranks, and its rates."""
