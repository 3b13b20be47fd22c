"""From a laptop to a machine with a GPU and back: plan, send, supervise there, fetch."""
