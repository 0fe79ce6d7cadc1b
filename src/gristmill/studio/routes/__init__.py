"""Routes of the studio's API, a file for each part of it."""
