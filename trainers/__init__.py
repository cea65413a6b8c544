"""One paper, one file; what they share lies behind `trainers.common`."""
