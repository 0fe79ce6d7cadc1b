"""What a run leaves for people to read: lines in the terminal, a page in the browser, runs side by side."""
