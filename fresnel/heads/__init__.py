"""Human heads with three-dimensional truth: people drawn by chance become multi-view data."""
