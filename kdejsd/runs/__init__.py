"""A run of the command: its settings, folder, checkpoints, report and scores."""
