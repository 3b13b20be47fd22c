"""Many runs as one experiment: arms, seeds, profiles, the notebooks' protocol."""
