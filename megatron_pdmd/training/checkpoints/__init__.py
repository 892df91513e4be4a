"""What a run saves, and where a launch takes it up."""
