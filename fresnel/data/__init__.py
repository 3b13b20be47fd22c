"""Multi-view data: its types, its files and hashes, and readers of what other tools write."""
