"""The 3D type and the cameras that look at it: one convention."""
