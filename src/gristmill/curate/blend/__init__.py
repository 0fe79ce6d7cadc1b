"""Documents of several sources as tokens to train on."""
