"""How good are views: metrics by azimuth, trivial baselines, intervals."""
