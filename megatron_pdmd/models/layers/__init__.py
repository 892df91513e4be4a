"""Building blocks that every diffusion transformer here shares."""
