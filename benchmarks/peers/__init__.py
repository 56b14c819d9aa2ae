"""The same attribution in pyinf and in the libraries users have today, each in its own environment."""
