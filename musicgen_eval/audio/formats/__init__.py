"""Length and position of samples in each compressed audio format."""
