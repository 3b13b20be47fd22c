"""3D objects become multi-view data with known truth."""
