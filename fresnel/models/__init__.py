"""The networks: image -> Gaussians (decoder), image and cameras -> view (CVS)."""
