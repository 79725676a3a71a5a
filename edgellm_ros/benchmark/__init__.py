"""What `edgellm bench` measures, how it is written down, and how it is drawn."""
