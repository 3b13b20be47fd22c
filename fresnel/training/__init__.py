"""The one training loop, its steps and checkpoints, and what decoder and CVS learn from."""
