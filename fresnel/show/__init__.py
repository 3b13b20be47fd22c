"""Pictures, charts and widgets of the reports, in one style."""
