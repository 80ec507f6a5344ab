"""What happened inside an engine: as a file for Perfetto, as a view in a terminal, and where a request's time went."""
