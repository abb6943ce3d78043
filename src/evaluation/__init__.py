"""Questions -> answers -> scores -> files."""
