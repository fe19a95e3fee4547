"""Audio files and sources: the samples that a slice of a file holds, and the tracks that a source names."""
