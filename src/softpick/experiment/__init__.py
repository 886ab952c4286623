"""What every command stands on: files that appear complete or not at all, and output folders that one process owns."""
