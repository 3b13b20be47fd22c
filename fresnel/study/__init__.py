"""Many runs as one experiment: what is trained on which data, against what, and in which order."""
