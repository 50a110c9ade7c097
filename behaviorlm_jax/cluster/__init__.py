"""Several processes, one run, one work directory."""
