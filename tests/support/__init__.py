"""Things that several test files need."""
