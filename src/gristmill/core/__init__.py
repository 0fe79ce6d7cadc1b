"""What every other part stands on: errors, files, recipes, progress, threads."""
