"""People at the door: the command line, and the trainer of the demo model."""
