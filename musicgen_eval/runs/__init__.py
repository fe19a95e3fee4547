"""One run: Lightning modules, callbacks, processes, run folder, resume."""
