"""What will be measured: tracks, what their files hold, windows, and the batches they are measured in."""
