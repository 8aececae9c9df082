"""Runs the command's work on a model: settings, folder, checkpoints, report and scores."""
