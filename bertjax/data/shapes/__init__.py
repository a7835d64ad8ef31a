"""Point clouds to train on, and where they come from."""
