"""How good predicted views are: metrics, azimuth bins, trivial baselines, intervals."""
