"""What it costs to merge checkpoints on disk; none of this is part of the library."""
